"""Sources on the Hugging Face hub, which a server on this machine plays."""

import hashlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpora import config, files, set_batch, texts
from hub_server import COMMIT, Hub

from engine.errors import BadInput
from engine.tokens import prepare, shards
from engine.tokens.preparation import building, estimate, journal
from engine.tokens.reading import hub, sources

pytest.importorskip("huggingface_hub")
LINES = {f"data/{i}.jsonl": [{"text": f"record {i} {j}"} for j in range(40)] for i in range(4)}
FILES = {name: "".join(json.dumps(one) + "\n" for one in lines).encode() for name, lines in LINES.items()}
SPLITS = zip(("train", "test"), FILES.values(), strict=False)
SOURCE = "hf:owner/texts"


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Returns what starts a hub and leads huggingface_hub to it."""
    from huggingface_hub import constants, file_download

    def start(files=FILES, **changes) -> Hub:
        server = Hub(files, **changes)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        servers.append(server)
        return server

    servers: list[Hub] = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run(out: Path, source: str = SOURCE, **changes) -> dict:
    return prepare.prepare([source], config(out, **changes))


def names(source: str) -> list[str]:
    return [one.name for one in hub.find(source, sources.SUFFIXES)]


def test_files_are_downloaded_one_ahead_and_removed_after_use(serve, tmp_path, monkeypatch):
    server, seen = serve(), []
    set_batch(monkeypatch, 100)
    monkeypatch.setattr(
        building, "parts", lambda path, *rest, read=building.parts: seen.append(path) or read(path, *rest)
    )
    there = []

    def done(self, path, before=hub.Downloads.done):
        there.append(sum(path.suffix == ".jsonl" for path in (tmp_path / "out" / hub.DOWNLOADS).rglob("*")))
        before(self, path)

    monkeypatch.setattr(hub.Downloads, "done", done)
    monkeypatch.setattr(journal, "EVERY", 0.0)
    manifest = run(tmp_path / "out")
    assert [name for name, _ in server.asked] == [*FILES]
    assert [path.name for path in seen] == [Path(name).name for name in FILES]
    assert max(there) <= 3 < len(FILES) + 1  # the one before, this one and the next
    assert there[-1] < len(FILES)
    written = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert sorted(written) == sorted(one["text"] for lines in LINES.values() for one in lines)
    assert manifest["sources"] == [SOURCE]
    assert not (tmp_path / "out" / hub.DOWNLOADS).exists()
    assert not (tmp_path / "cache").exists()
    assert run(tmp_path / "out") == manifest  # the list is made again, nothing is downloaded
    assert len(server.asked) == len(FILES)


def test_the_bytes_are_those_of_the_same_files_here(serve, tmp_path):
    serve()
    run(tmp_path / "remote" / "out")
    for name, content in FILES.items():
        (tmp_path / "owner" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "owner" / name).write_bytes(content)
    run(tmp_path / "local" / "out", str(tmp_path / "owner"))
    remote, local = (files(tmp_path / one / "out") for one in ("remote", "local"))
    assert {name: one for name, one in remote.items() if name != "manifest.json"} == {
        name: one for name, one in local.items() if name != "manifest.json"
    }


def test_a_connection_that_breaks_goes_on_in_the_middle_of_the_file(serve, tmp_path):
    server = serve(break_at=500)
    run(tmp_path / "out")
    assert server.asked == [(name, begin) for name in FILES for begin in ("", "bytes=500-")]


def test_a_preparation_that_lost_the_network_or_was_killed_goes_on(serve, tmp_path):
    serve()
    whole, downloads = run(tmp_path / "whole" / "out"), tmp_path / "out" / hub.DOWNLOADS
    serve(break_at=500, stays_broken=True)
    with pytest.raises(
        BadInput, match=r"data/0.jsonl: must be downloaded whole, .*; the same command goes on"
    ) as error:
        run(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    downloads.mkdir(exist_ok=True)
    (downloads / "a.1234.incomplete").write_bytes(b"of a killed one")
    hub.Downloads({}, downloads, keep=False)
    assert not [*downloads.rglob("*.incomplete")]
    serve()
    assert run(tmp_path / "out")["shards"] == whole["shards"]
    assert not downloads.exists()


def test_keep_leaves_the_files_in_the_cache_from_which_they_are_read_again(serve, tmp_path):
    server = serve()
    run(tmp_path / "one", keep=True)
    assert len(server.asked) == len(FILES)
    kept = [path for path in (tmp_path / "cache").rglob("*.jsonl")]
    assert len(kept) == len(FILES)
    run(tmp_path / "two")
    assert len(server.asked) == len(FILES)
    assert all(path.exists() for path in kept)


CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
        {
            "config_name": "both",
            "data_files": [{"split": "train", "path": ["a/*", "b/*"]}, {"split": "test", "path": "t/*"}],
        },
    ]
}
TREE = ["README.md", "data/0.parquet", "sample/10BT/1.parquet", "sample/10BT/2.parquet", "sample/99/3.parquet"]
TREE = dict.fromkeys([*TREE, "a/4.jsonl", "b/5.jsonl", "t/6.jsonl", "a/7.png"], b"x")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (SOURCE, ["data/0.parquet"]),
        (f"{SOURCE}/sample-10BT", ["sample/10BT/1.parquet", "sample/10BT/2.parquet"]),
        (f"{SOURCE}/sample-10BT@{COMMIT}", ["sample/10BT/1.parquet", "sample/10BT/2.parquet"]),
        (f"{SOURCE}/sample/99", ["sample/99/3.parquet"]),
        (f"{SOURCE}/sample/*/[12].parquet", ["sample/10BT/1.parquet", "sample/10BT/2.parquet"]),
        (f"{SOURCE}/both", ["a/4.jsonl", "b/5.jsonl"]),
    ],
)
def test_a_subset_is_one_of_the_card_or_a_directory_or_a_pattern(serve, source, expected):
    serve(TREE, card=CARD)
    assert names(source) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["0.parquet"]),
        ("./0.p?rquet", ["0.parquet"]),
        ("data/*.parquet", ["data/1.parquet"]),
        ("data/**/*.parquet", ["data/1.parquet", "data/x/2.parquet"]),
        ("**/*.parquet", ["0.parquet", "data/1.parquet", "data/x/2.parquet"]),
        ("data/**", ["data/1.parquet", "data/x/2.parquet"]),
        ("d*", []),
        ("data/[!0].parquet", ["data/1.parquet"]),
        ("[z-a]*", []),
    ],
)
def test_a_pattern_of_the_card_fits_the_files_that_it_fits_on_the_hub(pattern, expected):
    files = ["0.parquet", "data/1.parquet", "data/x/2.parquet"]
    card = [{"config_name": "default", "data_files": pattern}]
    assert hub._of_subset(SOURCE, "", files, card) == expected
    if expected:  # as the user's own
        assert hub._of_subset(SOURCE, pattern, files, []) == expected


def test_short_names_stand_for_repositories(tmp_path, monkeypatch):
    assert hub._parse("fineweb-edu") == ("HuggingFaceFW/fineweb-edu", "sample-10BT", None)
    assert hub._parse("fineweb-edu/sample-100BT@v1") == ("HuggingFaceFW/fineweb-edu", "sample-100BT", "v1")
    assert hub._parse("climbmix") == ("karpathy/climbmix-400b-shuffle", "", None)
    monkeypatch.chdir(tmp_path)
    assert hub.is_remote("fineweb-edu")
    assert not hub.is_remote("fineweb-edu-here")
    (tmp_path / "fineweb-edu").mkdir()
    assert not hub.is_remote("fineweb-edu")


def test_without_a_card_all_files_are_read_but_those_of_tests_beside_a_train_set(serve, tmp_path):
    tree = {f"data/{split}-0000-of-0001.jsonl": content for split, content in SPLITS}
    serve(tree | {"LICENSE.txt": b"no data"})
    found = sources.find([SOURCE])
    assert [path.name for path in found.files] == ["train-0000-of-0001.jsonl"]
    assert run(tmp_path / "out")["held_out"] == {"count": 1, "first": "hf:owner/texts/data/test-0000-of-0001.jsonl"}


@pytest.mark.parametrize(
    ("source", "server", "words"),
    [
        ("hf:owner/other", {}, "must be a data set on the hub, got none of the name owner/other"),
        (f"{SOURCE}@none", {}, "must name a branch, tag or commit that exists"),
        (SOURCE, {"status": 403}, "behind terms of use; accept them at https://huggingface.co/datasets/owner/texts"),
        (SOURCE, {"status": 500}, "must be reached, got "),
        (f"{SOURCE}/nothing", {"files": TREE, "card": CARD}, "got nothing; it has default, sample-10BT, both"),
        (f"{SOURCE}/nothing", {"files": TREE}, "got nothing; it has a, b, data, sample, t"),
        (f"{SOURCE}/a", {"files": {"a/b.tar": b"", "a/c.tar": b""}}, "got 2 .tar"),
        (
            SOURCE,
            {"card": {"configs": CARD["configs"][1:]}},
            "must name one of its 2 subsets, got none; they are sample-10BT",
        ),
        ("hf:owner", {}, "must be hf:OWNER/NAME[/SUBSET][@REVISION], got hf:owner"),
        ("hf:a b/c", {}, "must be hf:OWNER/NAME[/SUBSET][@REVISION], got "),
    ],
)
def test_what_cannot_be_listed_is_a_sentence(serve, tmp_path, source, server, words):
    serve(**server)
    with pytest.raises(BadInput) as error:
        run(tmp_path / "out", source)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["nobody listens", "offline"])
def test_without_network_the_offline_ways_are_named(serve, tmp_path, monkeypatch, how):
    serve().server_close()
    if how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="must be reached") as error:
        run(tmp_path / "out")
    for way in ("hf download --repo-type dataset owner/texts", "copy parquet files by hand", "tokenised already"):
        assert way in str(error.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match="pip install huggingface_hub"):
        run(tmp_path / "out")


def test_a_file_of_another_size_is_not_read(serve, tmp_path, monkeypatch):
    serve()
    monkeypatch.setattr(
        hub, "find", lambda source, suffixes: [hub.Remote("owner/texts", COMMIT, "data/0.jsonl", 7, "")]
    )
    with pytest.raises(BadInput, match=r"data/0\.jsonl: must have 7 bytes, got "):
        run(tmp_path / "out")


def test_a_file_keeps_its_blob_in_a_commit_that_does_not_change_it(serve):
    first = serve(FILES | {"data/4.parquet": b"large"})
    before = hub.find(SOURCE, sources.SUFFIXES)
    first.files = FILES | {"README.md": b"new", "data/4.parquet": b"large", "data/0.jsonl": b"{}"}
    first.commit = "f" * 40
    after = hub.find(SOURCE, sources.SUFFIXES)
    assert {one.commit for one in after} == {"f" * 40}
    assert [one.blob == other.blob for one, other in zip(before, after, strict=True)] == [False, True, True, True, True]
    assert after[-1].blob == hashlib.sha256(b"large").hexdigest()


@pytest.mark.parametrize("is_relative", [False, True], ids=["absolute", "relative"])
def test_a_file_is_removed_by_this_start_and_by_the_next_one(serve, tmp_path, monkeypatch, is_relative):
    serve()
    monkeypatch.chdir(tmp_path)
    directory = (Path() if is_relative else tmp_path) / "out" / hub.DOWNLOADS
    remote = {one.label: one for one in hub.find(SOURCE, sources.SUFFIXES)[:2]}
    downloads = hub.Downloads(remote, directory, keep=False)
    first, second = [(label, downloads.fetch(label)) for label in remote]
    downloads.done(first[0])
    assert not first[1].exists()
    hub.Downloads(remote, directory, keep=False).done(second[0])  # killed between the journal and the removal
    assert not second[1].exists()


def test_no_name_on_the_hub_has_a_file_elsewhere_removed(tmp_path):
    (tmp_path / "mine.txt").touch()
    one = hub.Remote("owner/texts", COMMIT, "../../../mine.txt", 0, "")
    hub.Downloads({one.label: one}, tmp_path / "out" / hub.DOWNLOADS, keep=False).done(one.label)
    assert (tmp_path / "mine.txt").exists()


def test_a_file_in_two_sources_is_read_once_and_that_is_said(serve, tmp_path):
    server = serve()
    manifest = prepare.prepare([f"{SOURCE}/data/1.jsonl", SOURCE], config(tmp_path / "out"))
    assert [name for name, _ in server.asked] == [f"data/{i}.jsonl" for i in (1, 0, 2, 3)]
    assert sum(manifest["documents"].values()) == sum(map(len, LINES.values()))
    assert manifest["not_read"] == {"named twice": 1}


def test_two_revisions_of_a_data_set_are_refused(serve):
    serve()
    with pytest.raises(BadInput, match=f"got owner/texts at {COMMIT} and {'f' * 40}; give all .* the same @REVISION"):
        sources.find([f"{SOURCE}/data/0.jsonl", f"{SOURCE}/data/1.jsonl@{'f' * 40}"])
    assert len(sources.find([f"{SOURCE}/data/0.jsonl", f"{SOURCE}/data/1.jsonl@{COMMIT}"]).files) == 2


def test_an_estimate_downloads_nothing_and_is_from_the_files_that_are_here(serve, tmp_path):
    server = serve()
    total = sum(map(len, FILES.values()))
    text = estimate.estimate([SOURCE], config(tmp_path / "out"))
    assert f"files       4 (4 .jsonl), {total / 1000:.1f} kB" in text
    assert f"hf download --repo-type dataset --revision {COMMIT} owner/texts data/0.jsonl" in text
    assert "tokens" not in text
    assert not server.asked
    made = run(tmp_path / "one" / "out", f"{SOURCE}/data/[01].jsonl", keep=True)
    lines = estimate.estimate([SOURCE], config(tmp_path / "out")).splitlines()
    assert len(server.asked) == 2
    assert "of 2 of the files" in lines[0]
    tokens = int(next(line for line in lines if "tokens" in line).split()[1].rstrip(",").replace(",", ""))
    assert tokens == pytest.approx(2 * sum(made["tokens"].values()), rel=0.05)


def test_a_local_source_beside_the_hub_s_counts_by_its_bytes(serve, tmp_path):
    serve()
    here = {one.label: one for one in hub.find(SOURCE, sources.SUFFIXES)}
    hub.Downloads(here, tmp_path / "out" / hub.DOWNLOADS, keep=False).fetch(next(iter(here)))
    (tmp_path / "x.txt").write_bytes(b"y" * 1000)
    found = sources.find([SOURCE, str(tmp_path / "x.txt")])
    files, weights, num_bytes = estimate._here(found, tmp_path / "out")
    whole = sum(map(len, FILES.values()))
    assert num_bytes == whole + 1000
    assert files[0] == tmp_path / "x.txt"
    assert weights[0] == 1000
    assert sum(weights[1:]) == pytest.approx(whole, abs=2)  # one or two files stand for all four


def test_the_next_file_is_downloaded_while_one_is_read(serve, tmp_path):
    server = serve()
    remote = {one.label: one for one in hub.find(SOURCE, sources.SUFFIXES)}
    hub.Downloads(remote, tmp_path / "downloads", keep=False).fetch(next(iter(remote)))
    latest = time.monotonic() + 10
    while len(server.asked) < 2 and time.monotonic() < latest:
        time.sleep(0.01)
    assert [name for name, _ in server.asked] == [*FILES][:2]


def test_a_file_is_removed_only_when_the_journal_holds_its_tokens(tmp_path, monkeypatch):
    out, removed = tmp_path / "out", []
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")

    def done(path):
        removed.append((int(path.stem), journal.read(out / shards.BUILDING)["place"][0]))

    fake = SimpleNamespace(fetch=lambda path: path, done=done)
    monkeypatch.setattr(building, "Downloads", lambda *_: fake)
    monkeypatch.setattr(journal, "EVERY", 0.0)
    set_batch(monkeypatch, 8)  # two files a batch
    prepare.prepare([str(tmp_path / f"{i}.txt") for i in range(5)], config(out))
    assert [index for index, _ in removed] == [*range(5)]
    assert all(index < place for index, place in removed)
    assert len({place for _, place in removed}) > 1, "some must go before the end"
