"""KV cache: keys and values of the tokens read so far, so that a new token costs the work of one position.

Memory is allocated once: for each layer keys and values, (B, H, S, D), of S columns. Prompts of
different lengths share a batch: all rows end in the same column, and shorter ones begin with
padding, whose keys no query sees. In a row with `pad` columns of padding, column c is position
c - pad. A model that masks documents sees keys from the column `begin` of the last end-of-text
token on. `Decoder` is what model.generate uses.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 64  # columns of a cache in a CUDA graph, for aligned reads of its mask


class Cache:
    """Keys and values of a batch, a LayerCache for each block.

    `prefill` and then `advance` say which tokens the next forward pass of the model reads. With
    is_static every decode step has the same shapes and reads all columns; the column to write is
    then a tensor, as a CUDA graph needs it.
    """

    def __init__(self, model, B: int, size: int, is_static: bool = False):
        config, device = model.config, model.wte.weight.device
        self.is_static, self.size = is_static, -(-size // MULTIPLE) * MULTIPLE if is_static else size
        shape, kind = (B, config.n_head, self.size, config.head_dim), {"dtype": model.compute_dtype, "device": device}
        self.layers = [
            LayerCache(self, torch.empty(shape, **kind), torch.empty(shape, **kind)) for _ in range(config.n_layer)
        ]
        self.end_of_text, self.restarts_positions = model.end_of_text, model.restarts_positions
        self.document_starts = model.document_starts
        self.columns = torch.arange(self.size, device=device)
        self.pad = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.begin = self.pad if self.end_of_text is None else self.pad.clone()  # first column that a new token sees
        self.column = torch.zeros(1, dtype=torch.int64, device=device)  # that a static step writes
        self.end, self.is_prefill, self.has_padding = 0, True, False
        self.positions = self.columns  # (T,), (B, T) or (B, 1): of the tokens that the next forward reads
        self.visible: Tensor | None = None  # (B, 1, T, keys) bool: keys that a query sees; None: see attention
        self.starts: Tensor | None = None  # of a prompt's documents

    def prefill(self, lengths: list[int], tokens: Tensor) -> None:
        """Forgets all. The next forward reads rows of these lengths, padded on their left: tokens (B, T)."""
        self.end, self.is_prefill, self.has_padding = max(lengths), True, min(lengths) < max(lengths)
        self.pad.copy_(torch.tensor([[self.end - length] for length in lengths]))
        self.column.fill_(self.end - 1)
        columns = self.columns[: self.end]
        self.starts = self.document_starts(tokens, self.pad)
        begins = self.pad if self.starts is None else self.starts  # (B, 1) or (B, T)
        self.begin.copy_(begins[:, -1:])
        self.positions, self.visible = columns, None
        if self.has_padding or self.restarts_positions:
            self.positions = (columns - (begins if self.restarts_positions else self.pad)).clamp(min=0)
        if self.has_padding:
            queries, keys = columns[:, None], columns  # padding sees itself, for a softmax of nothing is NaN
            seen = (keys <= queries) & (keys >= begins[:, :, None]) | (keys == queries)
            self.visible = seen[:, None]

    def advance(self, tokens: Tensor) -> None:
        """The next forward reads one more token of each row: tokens (B, 1)."""
        self.end, self.is_prefill = self.end + 1, False
        self.column += 1
        if not self.is_static:
            self.aim(tokens)
            if self.visible is not None:
                self.visible = self.visible[..., : self.end]

    def aim(self, tokens: Tensor) -> None:
        """Positions and mask of the tokens in self.column. Of a static cache, part of the CUDA graph."""
        if self.end_of_text is not None:
            self.begin.copy_(torch.where(tokens == self.end_of_text, self.column, self.begin))
        self.positions, self.visible = self.column, None
        if self.is_static or self.has_padding or self.end_of_text is not None:
            self.positions = self.column - (self.begin if self.restarts_positions else self.pad)
            self.visible = ((self.columns >= self.begin) & (self.columns <= self.column))[:, None, None]


class LayerCache:
    """Keys and values of one layer, (B, H, S, D)."""

    def __init__(self, cache: Cache, keys: Tensor, values: Tensor):
        self.cache, self.keys, self.values = cache, keys, values

    def attention(self, qkv: Tensor, causal_attention: Callable) -> Tensor:
        """Stores the new keys and values. Returns the attention of the new queries.

        qkv: (B, T, 3, H, D); result (B, T, H, D). causal_attention: the model's op, for prompts
        without padding.
        """
        cache = self.cache
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D)
        if cache.is_prefill:
            for stored, new in ((self.keys, k), (self.values, v)):
                stored[:, :, : cache.end] = new
                if cache.is_static:  # whose steps read these too, at a weight of 0, and 0 * NaN is NaN
                    stored[:, :, cache.end :] = 0.0
            if cache.visible is None:
                documents = {} if cache.starts is None else {"starts": cache.starts}
                return causal_attention(qkv, dropout_p=0.0, **documents)
        elif cache.is_static:
            k, v = self.keys.index_copy_(2, cache.column, k), self.values.index_copy_(2, cache.column, v)
        else:
            self.keys[:, :, cache.end - 1 : cache.end] = k
            self.values[:, :, cache.end - 1 : cache.end] = v
            k, v = self.keys[:, :, : cache.end], self.values[:, :, : cache.end]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.visible)
        return out.transpose(1, 2).contiguous()


class Weights:
    """Copies of the model's matrices with which a decode step is faster; a context manager for a forward.

    B: rows of a step. In a lower precision each matrix is cast once and not in each forward. In
    float32 a CPU's copies have another layout, see _product. A forward with gradients, as of another
    thread, does not use them. Only one thread may be inside. A sharded model has no copies.
    """

    @torch.no_grad()
    def __init__(self, model, B: int, is_compiled: bool = False):
        self.places: list[tuple[nn.Module, str, Callable]] = []
        weight, dtype = model.wte.weight.detach(), model.compute_dtype
        if hasattr(model, "unshard") or (dtype == torch.float32 and weight.device.type != "cpu"):
            return
        for linear in model.modules():
            if isinstance(linear, nn.Linear):
                if dtype == torch.float32:
                    self.places.append((linear, "product", _product(linear.weight.detach(), B, is_compiled)))
                else:
                    copies = {name: _cast(p, dtype, linear.copies.get(name)) for name, p in linear.named_parameters()}
                    self.places.append((linear, "cast", lambda name, dtype, copies=copies: copies[name]))
        head = _product(weight if dtype == torch.float32 else weight.to(dtype), B, is_compiled)
        self.places.append((model, "head", lambda h: head(h)[..., : model.config.vocab_size]))

    def __enter__(self) -> None:
        for module, name, function in self.places:
            module.__dict__[name] = _without_gradients(function, getattr(type(module), name), module)

    def __exit__(self, *_) -> None:
        for module, name, _ in self.places:
            del module.__dict__[name]


def _without_gradients(function: Callable, plain: Callable, module: nn.Module) -> Callable:
    """The function, or in a thread that computes gradients the module's plain method."""
    return lambda *args: plain(module, *args) if torch.is_grad_enabled() else function(*args)


def _cast(parameter: Tensor, dtype: torch.dtype, copy: Tensor | None) -> Tensor:
    """The parameter in this dtype. copy: of cast_once in training, written anew, for no more memory than that."""
    is_fit = copy is not None and (copy.dtype, copy.device) == (dtype, parameter.device)
    return copy.copy_(parameter) if is_fit else parameter.detach().to(dtype)


def _product(weight: Tensor, B: int, is_compiled: bool) -> Callable:
    """(x, bias) -> x weight^T + bias, of a copy of this matrix in the layout that is fastest for x of B rows.

    For one row that is (in, out) if there are more outputs than inputs, else the matrix's own. For
    several rows it is the one of oneDNN, where PyTorch has it: without it each product would first
    bring the matrix into such a layout.
    """
    if weight.dtype == torch.float32:
        if B > 1 and not is_compiled and (packed := _packed(weight, B)):
            return packed
        if weight.shape[0] > weight.shape[1]:
            weight = weight.t().contiguous().t()
    return lambda x, bias=None: F.linear(x, weight, bias)


def _packed(weight: Tensor, B: int) -> Callable | None:
    """The product with a matrix that oneDNN has packed, by the ops of torch.compile; None without them."""
    try:
        ops = torch.ops.mkldnn
        matrix, linear = ops._reorder_linear_weight(weight, B), ops._linear_pointwise
        linear(weight[:1], matrix, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):  # they are not public
        return None
    return lambda x, bias=None: linear(x, matrix, bias, "none", [], "")


class Decoder:
    """Logits of the next token, from a cache: `prefill` once, then `step` for each further token.

    size: most columns. uses_graph: capture the step in a CUDA graph; if that fails, a warning says
    so and the steps run without. is_compiled: by torch.compile first. copies_weights: see Weights.
    """

    def __init__(
        self,
        model,
        B: int,
        size: int,
        *,
        uses_graph: bool = False,
        is_compiled: bool = False,
        copies_weights: bool = True,
    ):
        self.model, self.cache = model, Cache(model, B, size, is_static=uses_graph or is_compiled)
        self.weights = Weights(model, B, is_compiled) if copies_weights else None
        self.tokens = torch.zeros(B, 1, dtype=torch.int64, device=model.wte.weight.device)
        self.run = torch.compile(self._run, dynamic=False) if is_compiled else self._run
        self.uses_graph, self.graph, self.logits = uses_graph, None, None

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Float32 logits (B, V) after rows of these lengths, which end where tokens (B, T) do."""
        tokens = tokens[:, -max(lengths) :]
        self.cache.prefill(lengths, tokens)
        with torch.cuda.device_of(self.tokens), self.weights or torch.no_grad():
            return self.model.last_logits(tokens, self.cache).float()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Float32 logits (B, V) after one more token of each row, (B, 1). Those of a graph are overwritten."""
        self.tokens.copy_(tokens)
        self.cache.advance(self.tokens)
        with torch.cuda.device_of(self.tokens), self.weights or torch.no_grad():
            if self.uses_graph and self.graph is None:
                self._capture()
            if self.graph is None:
                return self.run()
            self.graph.replay()
            return self.logits

    def _run(self) -> Tensor:
        if self.cache.is_static:
            self.cache.aim(self.tokens)
        return self.model.last_logits(self.tokens, self.cache).float()

    def _capture(self) -> None:
        """Captures the step that is due, whose writes may be repeated. Another thread may use the GPU meanwhile."""
        before = torch.cuda.current_stream()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(3):  # the first calls compile kernels and allocate workspaces
                    self.run()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self.run()
            self.graph = graph
        except RuntimeError as error:  # the steps are the same without it
            if isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize()
            self.uses_graph, self.run = False, self._run
            warnings.warn(f"generate: no CUDA graph, slower: {str(error).splitlines()[0]}", stacklevel=2)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
