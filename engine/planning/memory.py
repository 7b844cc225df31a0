"""Memory of one rank in a training step by part, by an estimate, and the largest micro-batch that fits.

A step may have its peak at several times, and the one that takes most counts:

    head             the forward pass has stored all activations and works on a chunk of logits
    head backward    its two gradients are scaled, which writes them a second time but on an uncompiled CPU
    last, first block  of the backward pass: activations go, gradients come
    end of backward  all gradients, and both of the tied embedding's but on an uncompiled CPU
    optimizer        all gradients, and what Muon multiplies

Free of PyTorch. tests/engine/planning/test_memory.py holds it against real peaks.
"""

from dataclasses import dataclass

from engine.config import TrainConfig
from engine.planning.communication import ITEMSIZE, padded_elements
from engine.planning.roofline_ops import cast_elements, linear_layers
from kernels.work import TRITON_HEAD_ROWS, torch_head_elements
from model.presets import STORED_WIDTHS, parameter_shapes

MICRO_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # sequences, of which a GPU takes the first that fits
MARGIN = 0.1  # share of the free memory left for fragments and what the estimate leaves out
PARTS = ("weights", "gradients", "moments", "activations", "head", "buffers")
WORKSPACES = 2 * 2**25  # bytes of cuBLAS's and cuBLASLt's on a Hopper
BLOCK_GRADIENTS = 5  # of activations at once in a block's backward pass, in widths C per token
# Muon's work at once, per C^2. On a CPU: four copies of one 4C x C matrix. On a GPU, for each block of the rank's
# share: all square matrices joined in float32, and x, its Gram matrix, a product and the result in bfloat16.
MUON_ON_CPU, MUON_ON_GPU = 64, 48

Parts = dict[str, int]  # bytes by the names of PARTS


@dataclass(frozen=True)
class Place:
    """Where a step runs."""

    world_size: int = 1
    per_host: int = 8  # ranks of one host, which share one replica of hsdp
    device_type: str = "cuda"
    is_compiled: bool | None = None  # None: on a GPU

    def shards(self, config: TrainConfig) -> int:
        """Number of ranks that share one copy of weights, gradients and moments."""
        hybrid = config.shard_size or min(self.per_host, self.world_size)
        return {"ddp": 1, "fsdp": self.world_size, "hsdp": hybrid}[config.parallel]


ONE_GPU = Place()


def parts(config: TrainConfig, micro_batch_size: int, precision: str, place: Place = ONE_GPU) -> Parts:
    """Bytes of one rank by part, at the time of a step that takes most.

    activations: what is stored for backward, and its gradients. head: logits and the two gradients
    that the head makes in its forward pass. buffers: casts of the weights, DDP's buckets, weights
    and gradients that FSDP has gathered, Muon's matrices, the workspaces of cuBLAS. The gradients
    are those of that time: with one micro-batch per step there are none at the head.
    """
    found = peaks(config, micro_batch_size, precision, place)
    return max(found.values(), key=lambda each: sum(each.values()))


def step_bytes(config: TrainConfig, micro_batch_size: int, precision: str, place: Place = ONE_GPU) -> int:
    """Peak bytes of one rank in a training step: the sum of its parts."""
    return sum(parts(config, micro_batch_size, precision, place).values())


def fits(config: TrainConfig, micro_batch_size: int, precision: str, free_bytes: float, place: Place = ONE_GPU) -> bool:
    """Whether the estimate fits into free_bytes with a margin."""
    return step_bytes(config, micro_batch_size, precision, place) <= free_bytes * (1 - MARGIN)


def largest_micro_batch(config: TrainConfig, precision: str, free_bytes: float, place: Place = ONE_GPU) -> int:
    """The largest of MICRO_BATCHES that fits into free_bytes; 1 if none does."""
    return next((size for size in MICRO_BATCHES if fits(config, size, precision, free_bytes, place)), 1)


class _Sizes:
    """What a step holds on one rank. In bytes, but for the elements of weights."""

    def __init__(self, config: TrainConfig, micro_batch_size: int, precision: str, place: Place):
        model, shards, shapes = config.model, place.shards(config), parameter_shapes(config.model)
        self.e = ITEMSIZE[precision]
        self.is_sharded = config.parallel != "ddp"
        self.tokens = micro_batch_size * config.sequence_length
        self.block = padded_elements([shape for name, shape in shapes.items() if name.startswith("h.0.")], shards)
        self.root = padded_elements([shape for name, shape in shapes.items() if not name.startswith("h.")], shards)
        self.local = (model.n_layer * self.block + self.root) // shards  # elements that this rank holds
        self.table = 4 * model.padded_vocab_size * model.n_embd  # gradient of the embedding
        self.width = self.tokens * model.n_embd * self.e  # (B, T, C)
        self.linear = cast_elements(model, tuple(linear_layers(model)))  # elements that are cast
        self.has_several = config.tokens_per_step > self.tokens * place.world_size  # micro-batches per step
        # Gradients of this rank before a micro-batch's backward pass.
        self.before = 4 * self.local if self.has_several else 0

    def activations(self, config: TrainConfig, blocks: int, *, is_backward: bool = False) -> int:
        """Stored by the first blocks, and by the one above them of which the backward pass works."""
        model, stored = config.model, STORED_WIDTHS[config.recompute]
        widths = blocks * stored - (config.recompute == "block")  # the first block has one input
        if is_backward:
            widths += STORED_WIDTHS["none"] + (stored if config.recompute == "block" else 0) + BLOCK_GRADIENTS
        else:
            widths += 2  # the last LayerNorm's input and output
        kept = blocks if config.recompute != "block" else 0
        statistics = 4 * self.tokens * ((kept + is_backward) * (4 + model.n_head) + 2)
        masks = self.tokens * model.n_embd * (2 * (kept + is_backward) + 1) if model.dropout else 0
        return widths * self.width + statistics + masks

    def logits(self, config: TrainConfig, place: Place) -> int:
        """A chunk of logits, and their float32 copy where PyTorch makes one."""
        Vp = config.model.padded_vocab_size
        if place.device_type == "cuda" and config.kernels != "torch":
            rows, wide = TRITON_HEAD_ROWS, 0
        else:
            rows, wide = (max(1, elements // Vp) for elements in torch_head_elements(place.device_type, self.e))
            wide = 0 if place.device_type == "cpu" and self.e == 4 else wide  # float32 logits are overwritten
        chunk = -(-self.tokens // -(-self.tokens // rows))
        return Vp * (chunk * self.e + min(chunk, wide) * 4)


def peaks(config: TrainConfig, micro_batch_size: int, precision: str, place: Place = ONE_GPU) -> dict[str, Parts]:
    """The parts at each time of a step that may be its peak."""
    model, it = config.model, _Sizes(config, micro_batch_size, precision, place)
    is_compiled = place.device_type == "cuda" if place.is_compiled is None else place.is_compiled
    cast = it.e * model.padded_vocab_size * model.n_embd if it.e < 4 else 0
    stored, L = it.activations(config, model.n_layer), model.n_layer
    # One graph returns all gradients at its end; DDP's is cut at its buckets.
    is_whole = is_compiled and place.world_size == 1 and not it.is_sharded
    # Eagerly on a CPU, scaling the head's gradient and adding the embedding's make no further matrix.
    is_in_place = place.device_type == "cpu" and not is_compiled and not it.is_sharded
    tables = (1 if is_in_place else 2) * it.table
    # Gathered by FSDP: the root's weights to the end, and without resharding all blocks'.
    root = 4 * it.root if it.is_sharded else 0
    forward = root + (L * it.e * it.block if it.is_sharded and not config.reshard else 0)
    # A block's weights and gradients, as measured on a CPU; a GPU gathers the next block's weights meanwhile.
    reduced = ((2 + (place.device_type == "cuda")) * it.e + 2) * it.block if it.is_sharded else 0

    def block(index: int) -> tuple[int, int, int, int]:
        """The backward pass of a block."""
        made = 4 * (L - 1 - index) * it.block // place.shards(config)
        gathered = root + reduced + (index * it.e * it.block if it.is_sharded and not config.reshard else 0)
        gradients = it.before + made if is_whole else max(it.before, made)
        return gradients, it.activations(config, index, is_backward=True), it.table, gathered

    all_gradients = 4 * it.local
    found = {
        "head": (it.before, stored, it.width + it.table + it.logits(config, place) + cast, forward),
        "head backward": (it.before, stored, 2 * it.width + tables, forward),
        "last block": block(L - 1),
        "first block": block(0),
        "end of backward": (
            it.before + all_gradients if is_whole else max(it.before, all_gradients - it.table),
            it.width,
            it.table if is_whole else tables,
            2 * root,
        ),
        "optimizer": (all_gradients, 0, 0, muon_bytes(config, place) if config.optim.name == "muon" else 0),
    }
    return {name: _parts(sizes, config, it, place) for name, sizes in found.items()}


def muon_bytes(config: TrainConfig, place: Place) -> int:
    """Muon's matrices on one rank: what it multiplies, and those it sends and receives."""
    L, squared = config.model.n_layer, config.model.n_embd**2
    is_sharded = config.parallel != "ddp"
    peers = place.shards(config) if is_sharded else place.world_size
    share = max(16, 48 * L // peers) * squared  # the matrices of which it makes the update
    work = squared * (MUON_ON_CPU if place.device_type == "cpu" else MUON_ON_GPU * -(-L // peers))
    if peers == 1:
        return work
    return share + max(work, 2 * share) if is_sharded else max(work, share)


def _parts(sizes: tuple[int, int, int, int], config: TrainConfig, it: _Sizes, place: Place) -> Parts:
    gradients, activations, head, buffers = sizes
    moments_ = 8 * it.local
    if config.optim.name == "muon":  # one moment of the blocks' matrices, and a number for each of their rows
        fewer = [(M, K - config.optim.muon_rows) for K, M, _ in linear_layers(config.model).values()]
        shards = place.shards(config)
        moments_ -= 4 * config.model.n_layer * padded_elements(fewer, shards) // shards
    if place.device_type == "cuda":
        buffers += WORKSPACES
    if not it.is_sharded:
        buffers += it.e * it.linear if it.e < 4 else 0
        buffers += 4 * it.local if place.world_size > 1 else 0
    return dict(zip(PARTS, (4 * it.local, gradients, moments_, activations, head, buffers), strict=True))
