"""Screening on one CUDA device, many short runs at once, each step a CUDA graph: `python screening_cuda.py JOBS.json OUT RANK WORLD SECONDS`.

Written to be thrown away, as screening.py of commit 6dd241b was; the numbers are in docs/learning.md. Token shards lie in sdata/ beside it.
"""

import contextlib, glob, json, math, sys, time, traceback
from dataclasses import replace
import numpy as np, torch
from model.gpt2 import GPT2
from model.presets import PRESETS

DEV = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEV.type == "cuda"
GRAPHS = CUDA
D = dict(arm="x", case="tiny", data="bytes", steps=380, B=16, T=64, seed=101, opt="muon", lr=4e-3, muon_lr=0.04, mom=0.8, nesterov=True, rows=False, ns="jordan",
         orth="fp32", sched="linear", asched="", warm=24, awarm=None, minr=0.0, decay=1.0, beta1=0.9, beta2=0.99, wd=0.1, adam_wd=None, cautious=False, wd2=False, slow=0.0, slow_beta=0.99,
         ema=0.0, bramp=None, clip=1.0, soap="", soap_every=10, soap_beta=0.95, outer=0.0, outer_mom=0.0, outer_every=10, momwarm=0, momend=None, evals=65536, init="zero_residual")
J = ((3.4445, -4.7750, 2.0315),) * 5
PE = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in ((8.28721201814563, -23.595886519098837, 17.300387312530933), (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
     (3.9486908534822946, -2.908902115962949, 0.5518191394370137), (3.3184196573706015, -2.488488024314874, 0.51004894012372), (2.300652019954817, -1.6689039845747493, 0.4188073119525673)))
_data = {}
def data(name):
    if name not in _data:
        get = lambda split: torch.from_numpy(np.fromfile(sorted(glob.glob(f"{ROOT}/{name}/*{split}*.bin"))[0], dtype=np.uint16)[512:].astype(np.int32)).to(DEV)
        tr, va = get("train"), get("val")
        n = int(len(tr) * 0.9)
        _data[name] = tr[:n], tr[n:], va
    return _data[name]

def orth(m, o):
    wide = m.shape[1] <= m.shape[2]
    x = m if wide else m.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if o["orth"] == "bf16": x = x.bfloat16()
    for a, b, c in PE if o["ns"] == "polar" else J:
        g = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(g, g, g, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()

def factor(o, s, sched, warm):
    n = o["steps"]
    if warm and s < warm: return (s + 1) / warm
    if sched == "cosine":
        return o["minr"] + (1 - o["minr"]) * 0.5 * (1 + math.cos(math.pi * min(1, (s - warm) / max(1, n - warm))))
    d = max(1, min(round(o["decay"] * n), n - warm))
    return 1.0 if s < n - d else o["minr"] + (1 - o["minr"]) * (n - s) / d

class Run:
    def __init__(r, o):
        r.o = o
        torch.manual_seed(o["seed"])
        r.model = GPT2(replace(PRESETS[o["case"]], init=o["init"])).to(DEV)
        named = dict(r.model.named_parameters())
        r.mats = {n: p for n, p in named.items() if n.startswith("h.") and p.ndim == 2} if o["opt"] == "muon" else {}
        r.params = list(named.values())
        adam = {n: p for n, p in named.items() if n not in r.mats}
        r.two = [p for p in adam.values() if p.ndim >= 2]
        r.one = [p for p in adam.values() if p.ndim < 2]
        r.adam = r.two + r.one
        z = lambda ps: [torch.zeros_like(p) for p in ps]
        r.m, r.v = z(r.adam), z(r.adam)
        r.groups = {}
        for n, p in r.mats.items():
            parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
            for k in range(parts): r.groups.setdefault((p.shape[0] // parts, p.shape[1]), []).append((p, k, parts))
        r.mom = {s: torch.zeros(len(g), *s, device=DEV) for s, g in r.groups.items()}
        r.slow = {s: torch.zeros_like(m) for s, m in r.mom.items()} if o["slow"] else {}
        r.rows = {s: torch.zeros(len(g), s[0], 1, device=DEV) for s, g in r.groups.items()} if o["rows"] else {}
        r.soap = {}
        if o["soap"]:
            for s, g in r.groups.items():
                d = r.soap[s] = {"v": torch.zeros(len(g), *s, device=DEV)}
                sides = "LR" if o["soap"] == "two" else "L" if s[0] <= s[1] else "R"
                for side in sides:
                    w = s[0] if side == "L" else s[1]
                    d[side] = torch.zeros(len(g), w, w, device=DEV)
                    d["Q" + side] = torch.eye(w, device=DEV).repeat(len(g), 1, 1)
        r.anchor = [p.detach().clone() for p in r.params] if o["outer"] else None
        r.outer_m = z(r.params) if o["outer"] else None
        r.ema = [p.detach().clone() for p in r.params] if o["ema"] else None
        rows = []
        for s in range(o["steps"]):
            f = factor(o, s, o["sched"], o["warm"])
            fa = factor(o, s, o["asched"] or o["sched"], o["warm"] if o["awarm"] is None else o["awarm"])
            alr, mlr, wd = o["lr"] * fa, o["muon_lr"] * f, o["wd"]
            awd = wd if o["adam_wd"] is None else o["adam_wd"]
            mom = o["mom"]
            if o["momwarm"] and s < o["momwarm"]: mom = 0.85 * mom + 0.15 * mom * s / o["momwarm"]
            if o["momend"] is not None: mom += (o["momend"] - o["mom"]) * s / o["steps"]
            dm = (o["muon_lr"] * f * f if o["wd2"] else mlr) * wd
            rows.append([alr, mlr, dm, alr * awd, 1 - o["beta1"] ** (s + 1), 1 - o["beta2"] ** (s + 1), 1 - mom, 1 - o["soap_beta"] ** (s + 1), 1 - o["slow_beta"] ** (s + 1)])
        r.table = torch.tensor(rows, device=DEV)
        r.scal = r.table[0].clone()
        g = np.random.default_rng(o["seed"] * 7919 + 13)
        r.tr, r.tune, r.val = data(o["data"])
        T, r.B = o["T"], []
        idx = []
        for s in range(o["steps"]):
            B = o["B"]
            for frac, b in o["bramp"] or ():
                if s >= frac * o["steps"]: B = b
            r.B.append(B); idx.append(g.integers(0, (len(r.tr) - 1) // T, B))
        r.idx = [torch.from_numpy(i * T).to(DEV) for i in idx] if o["bramp"] else (torch.from_numpy(np.stack(idx)) * T).to(DEV)
        r.span = torch.arange(T + 1, device=DEV)
        r.bufs = {B: torch.zeros(B, T + 1, dtype=torch.long, device=DEV) for B in set(r.B)}
        r.graphs = {}

    def update(r, B):
        o = r.o
        b = r.bufs[B]
        loss = r.model(b[:, :-1], b[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(r.params, o["clip"], foreach=True)
        alr, mlr, dm, da, c1, c2, im, cs, cl = r.scal.unbind()
        with torch.no_grad():
            gs = [p.grad for p in r.adam]
            torch._foreach_lerp_(r.m, gs, 1 - o["beta1"])
            torch._foreach_mul_(r.v, o["beta2"]); torch._foreach_addcmul_(r.v, gs, gs, 1 - o["beta2"])
            den = torch._foreach_div(r.v, c2); torch._foreach_sqrt_(den); torch._foreach_add_(den, 1e-8)
            u = torch._foreach_div(r.m, den); torch._foreach_mul_(u, alr / c1)
            torch._foreach_mul_(r.two, 1 - da); torch._foreach_sub_(r.adam, u)
            for s, items in r.groups.items():
                g = torch.stack([p.grad.chunk(n)[k] for p, k, n in items])
                m = r.mom[s]
                m += (g - m) * im
                u = g + (m - g) * (1 - im) if o["nesterov"] else m
                if o["slow"]:
                    r.slow[s].lerp_(g, 1 - o["slow_beta"]); u = u + o["slow"] * r.slow[s]
                if o["soap"]: u = r.rotate(s, g, u, cs)
                u = orth(u, o)
                if o["rows"]:
                    v = r.rows[s]; v.lerp_((u * u).mean(2, keepdim=True), 0.05)
                    was = u.norm(dim=(1, 2), keepdim=True)
                    u = u / (v.sqrt() + 1e-8); u = u * (was / u.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12))
                w = torch.stack([p.chunk(n)[k] for p, k, n in items])
                keep = dm * w * (u * w > 0) if o["cautious"] else dm * w
                new = w - keep - u * (mlr * max(1.0, s[0] / s[1]) ** 0.5)
                torch._foreach_copy_([p.chunk(n)[k] for p, k, n in items], list(new.unbind()))
            if r.ema is not None: torch._foreach_lerp_(r.ema, r.params, 1 - o["ema"])

    def rotate(r, s, g, u, cs):
        d, b = r.soap[s], r.o["soap_beta"]
        if "L" in d: d["L"].lerp_(g @ g.mT, 1 - b); g, u = d["QL"].mT @ g, d["QL"].mT @ u
        if "R" in d: d["R"].lerp_(g.mT @ g if "L" not in d else r._raw(g, d), 1 - b); g, u = g @ d["QR"], u @ d["QR"]
        d["v"].lerp_(g * g, 1 - b)
        w = u / ((d["v"] / cs).sqrt() + 1e-8)
        if "L" in d: w = d["QL"] @ w
        if "R" in d: w = w @ d["QR"].mT
        return w

    def _raw(r, g, d):  # R of the gradient before the rotation from the left
        raw = d["QL"] @ g
        return raw.mT @ raw

    def refresh(r, s):
        for d in r.soap.values():
            for side in "LR":
                if side in d:
                    q = torch.linalg.eigh(d[side])[1] if s == 0 else torch.linalg.qr(d[side] @ d["Q" + side])[0]
                    d["Q" + side].copy_(q)

    def one_step(r, s):
        B = r.B[s]
        r.scal.copy_(r.table[s])
        r.bufs[B].copy_(r.tr[r.idx[s][:, None] + r.span])
        done = r.graphs.get(B)
        if isinstance(done, int) and done >= 3 and GRAPHS:
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g, stream=torch.cuda.current_stream()):
                for p in r.params: p.grad = None
                r.update(B)
            r.graphs[B] = g
            g.replay()
        elif done is None or isinstance(done, int):
            for p in r.params: p.grad = None
            r.update(B)
            r.graphs[B] = (done or 0) + 1
        else:
            done.replay()
        if r.soap and (s % r.o["soap_every"] == 0): r.refresh(s)
        if r.anchor is not None and ((s + 1) % r.o["outer_every"] == 0 or s + 1 == r.o["steps"]):
            with torch.no_grad():
                d = torch._foreach_sub(r.params, r.anchor)
                torch._foreach_mul_(r.outer_m, r.o["outer_mom"]); torch._foreach_add_(r.outer_m, d)
                torch._foreach_add_(d, r.outer_m, alpha=r.o["outer_mom"])
                torch._foreach_add_(r.anchor, d, alpha=r.o["outer"])
                torch._foreach_copy_(r.params, r.anchor)

    @torch.no_grad()
    def evaluate(r, stream):
        T = r.o["T"]; k = r.o["evals"] // T
        n = (len(stream) - 1) // T
        idx = torch.arange(k, device=DEV) * n // k * T
        total = 0.0
        r.model.eval()
        for i in idx.split(max(1, 8192 // T)):
            b = stream[i[:, None] + r.span].long()
            total += r.model(b[:, :-1], b[:, 1:]).double() * len(i)
        r.model.train()
        return round(float(total) / len(idx), 4)

def row_of(r, began):
    o = r.o
    row = {k: o[k] for k in o if o[k] != D[k] or k in ("arm", "seed", "steps", "case")}
    row |= {"tune": r.evaluate(r.tune), "val": r.evaluate(r.val)}
    if r.ema is not None:
        with torch.no_grad(): torch._foreach_copy_(r.params, r.ema)
        row |= {"tune_ema": r.evaluate(r.tune), "val_ema": r.evaluate(r.val)}
    row["wall"] = round(time.perf_counter() - began, 2)
    return row

def together(jobs):
    """Several runs at once, each on a stream of its own."""
    began = time.perf_counter()
    streams = [torch.cuda.Stream() if CUDA else None for _ in jobs]
    on = lambda i: torch.cuda.stream(streams[i]) if CUDA else contextlib.nullcontext()
    runs = []
    for i, job in enumerate(jobs):
        data((D | job)["data"])
        if CUDA: torch.cuda.synchronize()
        with on(i): runs.append(Run(D | job))
    for s in range(max(r.o["steps"] for r in runs)):
        for i, r in enumerate(runs):
            if s < r.o["steps"]:
                with on(i): r.one_step(s)
    rows = []
    for i, r in enumerate(runs):
        if CUDA: torch.cuda.synchronize()
        with on(i): rows.append(row_of(r, began))
    return rows

if __name__ == "__main__":
    ROOT = sys.argv[0].rpartition("/")[0] + "/sdata"
    jobs, out, rank, world, seconds = json.load(open(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    torch.set_num_threads(2 if CUDA else 1); torch.backends.cuda.matmul.allow_tf32 = True
    end = time.time() + seconds
    size = int(sys.argv[6]) if len(sys.argv) > 6 else 8
    groups = [jobs[i : i + size] for i in range(0, len(jobs), size)][rank::world]
    with open(f"{out}.{rank}", "w") as f:
        for group in groups:
            if time.time() > end: break
            try: rows = together(group)
            except Exception:
                print(json.dumps({"error": traceback.format_exc()[-2500:], "jobs": len(group)}), file=f, flush=True)
                if not GRAPHS: continue
                GRAPHS = False
                try: rows = together(group)
                except Exception: rows = [{"error": traceback.format_exc()[-2500:]}]
            for row in rows: print(json.dumps(row), file=f, flush=True)
