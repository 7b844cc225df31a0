"""Translates PTX, as Triton emits it for sm_80 and sm_90, into a program for the interpreter in runtime.h.

The tables below hold every instruction that computes each lane by itself: mnemonic -> types and C++ expression. The
interpreter has a handler for each, so it is built once and not once per kernel. Memory, tensor cores, shuffles and
control flow have handlers in runtime.h. An instruction that is in neither raises Unsupported, which names it.
"""

import re
from array import array
from collections.abc import Iterator

LANES = 32
SPECIAL = ("%tid.x", "%laneid", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
KINDS = ("f16", "bf16", "tf32")  # of factors of a matrix product
SIGNED, UNSIGNED, BITS, HALVES = "s16 s32 s64", "u16 u32 u64", "b16 b32 b64", "f16 bf16"
INTEGERS = f"{SIGNED} {UNSIGNED}"

# Mnemonic -> C++ expression of the sources a, b and c, all of the instruction's type, T.
OF_INTEGERS = {
    "add": "a + b", "sub": "a - b", "mul.lo": "a * b", "mad.lo": "a * b + c", "div": "quotient<T>(a, b)",
    "rem": "a - quotient<T>(a, b) * b", "min": "a < b ? a : b", "max": "a > b ? a : b", "neg": "-a",
    "abs": "a < 0 ? -a : a",
}  # fmt: skip
OF_BITS = {"mov": "a", "and": "a & b", "or": "a | b", "xor": "a ^ b", "not": "~a"}
OF_PREDICATES = {"mov": "a != 0", "and": "a && b", "or": "a || b", "xor": "!a != !b", "not": "!a"}
OF_SINGLES = {  # each also with .ftz, which makes subnormal operands and results 0
    "add": "a + b", "add.rn": "a + b", "sub": "a - b", "sub.rn": "a - b", "mul": "a * b", "mul.rn": "a * b",
    "fma.rn": "std::fma(a, b, c)", "min": "minimum(a, b)", "max": "maximum(a, b)", "abs": "std::fabs(a)", "neg": "-a",
    "max.NaN": "a != a || b != b ? NAN : maximum(a, b)", "min.NaN": "a != a || b != b ? NAN : minimum(a, b)",
    "div.full": "a / b", "div.rn": "a / b", "div.approx": "a / b", "rcp.approx": "1.f / a", "rcp.rn": "1.f / a",
    "sqrt.approx": "std::sqrt(a)", "sqrt.rn": "std::sqrt(a)", "rsqrt.approx": "1.0 / std::sqrt((double)a)",
    "ex2.approx": "std::exp2((double)a)", "lg2.approx": "std::log2((double)a)", "tanh.approx": "std::tanh((double)a)",
    "cvt.rni.f32": "std::nearbyint(a)", "cvt.rzi.f32": "std::trunc(a)", "cvt.rmi.f32": "std::floor(a)",
}  # fmt: skip
# Also of pairs; computed in double and rounded once.
OF_HALVES = {name: OF_SINGLES[name] for name in ("add", "add.rn", "sub", "mul", "mul.rn", "neg", "min", "max")}
OF_HALVES["fma.rn"] = "a * b + c"
COMPARISONS = {"eq": "a == b", "ne": "a < b || a > b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"}
# Mnemonic, types that T stands for, types of destination and sources, C++ expression.
OF_SEVERAL_TYPES = (
    ("mul.hi.T", "s32 u32", "T T T", "(std::conditional_t<T(-1) < 0, s64, u64>)a * b >> 32"),
    ("mul.wide.T", "s32", "s64 T T", "(s64)a * b"),
    ("mul.wide.T", "u32", "u64 T T", "(u64)a * b"),
    ("mad.wide.T", "s32", "s64 T T s64", "(s64)a * b + c"),
    ("mad.wide.T", "u32", "u64 T T u64", "(u64)a * b + c"),
    ("shl.T", BITS, "T T u32", "b < 8 * sizeof a ? a << b : 0"),
    ("shr.T", f"{UNSIGNED} {BITS}", "T T u32", "b < 8 * sizeof a ? a >> b : 0"),
    ("shr.T", SIGNED, "T T u32", "a >> std::min<u32>(b, 8 * sizeof a - 1)"),
    ("shf.l.wrap.T", "b32", "T T T u32", "((u64)b << 32 | a) << (c & 31) >> 32"),
    ("shf.r.wrap.T", "b32", "T T T u32", "((u64)b << 32 | a) >> (c & 31)"),
    ("bfe.T", "u32 s32", "T T u32 u32", "extract(a, b, c)"),
    ("prmt.T", "b32", "T T T T", "permute(a, b, c)"),
    ("selp.T", f"{BITS} {INTEGERS} f32", "T T T pred", "c ? a : b"),
    ("mov.T", f"{INTEGERS} f32", "T T", "a"),
    ("pack.T", "b32", "T b16 b16", "(u32)b << 16 | a"),  # mov.b32 r, {a, b}
    ("pack.T", "b64", "T b32 b32", "(u64)b << 32 | a"),
    ("unpack0.T", "b32", "b16 T", "a"),  # mov.b32 {r, _}, a
    ("unpack1.T", "b32", "b16 T", "a >> 16"),  # mov.b32 {_, r}, a
    ("unpack0.T", "b64", "b32 T", "a"),
    ("unpack1.T", "b64", "b32 T", "a >> 32"),
    *((f"setp.{name}.T", f"{BITS} {INTEGERS} f32", "pred T T", test) for name, test in COMPARISONS.items()),
    *((f"setp.{name}u.T", "f32", "pred T T", f"a != a || b != b || {test}") for name, test in COMPARISONS.items()),
    ("setp.nan.T", "f32", "pred T T", "a != a || b != b"),
    ("setp.num.T", "f32", "pred T T", "a == a && b == b"),
    *((f"cvt.{to}.T", INTEGERS, f"{to} T", "a") for to in INTEGERS.split()),
    ("cvt.rn.f32.T", INTEGERS, "f32 T", "a"),
    ("cvt.rzi.T.f32", INTEGERS, "T f32", "saturated<T>(std::trunc(a))"),
    ("cvt.rni.T.f32", INTEGERS, "T f32", "saturated<T>(std::nearbyint(a))"),
    ("cvt.f32.T", HALVES, "f32 T", "a"),
    ("cvt.rn.T.f32", HALVES, "T f32", "a"),
    ("cvt.rn.Tx2.f32", HALVES, "Tx2 f32 f32", "{T(b), T(a)}"),
    ("cvt.rna.tf32.f32", "b32", "T T", "(a + 0x1000u) & 0xffffe000u"),
)


class Unsupported(Exception):
    """An instruction, or a form of one, that the emulator does not know."""


def _wrapped(expression: str, form: str) -> str:
    """The expression with each of its sources put into a form such as "flush({})"."""
    return re.sub(r"\b[abc]\b", lambda source: form.format(source[0]), expression)


def _instructions() -> Iterator[tuple[str, str, str]]:
    """Every mnemonic with the types of destination and sources, and the C++ expression."""

    def same(kind: str, expression: str) -> str:
        return " ".join([kind] * (1 + len(set(re.findall(r"\b[abc]\b", expression)))))

    of_one_type = ((OF_INTEGERS, INTEGERS), (OF_BITS, BITS), (OF_PREDICATES, "pred"))
    rows = [
        *((f"{name}.T", kinds, same("T", text), text) for table, kinds in of_one_type for name, text in table.items()),
        *OF_SEVERAL_TYPES,
    ]
    for mnemonic, kinds, types, expression in rows:
        for kind in kinds.split():
            yield mnemonic.replace("T", kind), types.replace("T", kind), re.sub(r"\bT\b", kind, expression)
    for name, text in OF_SINGLES.items():
        yield f"{name}.f32", same("f32", text), text
        yield f"{name}.ftz.f32", same("f32", text), f"flush({_wrapped(text, 'flush({})')})"
    for name, text in OF_HALVES.items():
        for kind in HALVES.split():
            yield f"{name}.{kind}", same(kind, text), f"{kind}({_wrapped(text, '(double){}')})"
            halves = (f"{kind}({_wrapped(text, f'(double){{}}.{half}')})" for half in ("low", "high"))
            yield f"{name}.{kind}x2", same(f"{kind}x2", text), f"{{{', '.join(halves)}}}"


# Mnemonic -> C++ types and expression; bits are unsigned integers there. Several mnemonics may share a body.
INSTRUCTIONS = {
    name: (re.sub(r"\bb(16|32|64)\b", r"u\1", types), expression) for name, types, expression in _instructions()
}
_BODIES = {body: f"compute{index}" for index, body in enumerate(sorted(set(INSTRUCTIONS.values())))}
_OTHERS = (
    "move<false>", "move<true>", "copy_async", "commit_group", "wait_group", "move_matrix<false>", "move_matrix<true>",
    "shuffle", "branch", "leave", "barrier", "mma", "wgmma",
)  # fmt: skip
_HANDLERS = {name: index for index, name in enumerate((*_BODIES.values(), *_OTHERS))}
# They order what the emulator does at once and in order anyway.
_NOTHING = re.compile(r"bar\.warp|fence|membar|wgmma\.(fence|commit|wait)|griddepcontrol|\.(loc|pragma|file)")


def handlers() -> str:
    """C++ source of the handlers of INSTRUCTIONS and the list of all handlers."""
    lines = []
    for (types, expression), name in _BODIES.items():
        result, *sources = types.split()
        named = list(zip("abc", sources, range(1, 4), strict=False))
        pointers = [f"const {kind}* p{source} = values<{kind}>(w, o[{place}]);" for source, kind, place in named]
        loads = [f"const {kind} {source} = p{source}[l];" for source, kind, _ in named]
        lines += [
            f"static void {name}(Warp& w, const int* o) {{",
            f"{result}* to = values<{result}>(w, o[0]); {' '.join(pointers)}",
            "#pragma GCC ivdep",  # a destination is a source or apart from it
            f"for (int l = 0; l < LANES; ++l) {{ {' '.join(loads)} to[l] = {expression}; }} }}",
        ]
    return "\n".join([*lines, f"const Handler HANDLERS[] = {{{', '.join(_HANDLERS)}}};"])


def _size(kind: str) -> int:
    """Bytes of a C++ type."""
    return 1 if kind == "pred" else 4 if kind.endswith("x2") else int(kind.lstrip("usbf")) // 8


def _elements(text: str) -> list[str]:
    """Members of {a, b}, or the only one."""
    return [part.strip() for part in text.strip("{} ").split(",")]


class Program:
    """A kernel for the interpreter: instructions, their operands, and the registers of a warp at its start."""

    def __init__(self, ptx: str):
        head, body = ptx[ptx.index(".visible .entry") :].split("\n{\n", 1)
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
        self.instructions, self.operands = array("i"), array("i")  # the former five numbers each, struct Instruction
        self._slots: dict[str, tuple[int, int]] = {}  # register, parameter or constant -> offset, bytes of a lane
        self._bytes = 0
        self._constants: dict[int, bytes] = {}  # offset -> bytes of a lane
        self._classes = {"scratch": 1}  # first letters of registers -> bytes of a lane
        for name in SPECIAL:
            self._slot(name, 4)
        self._parameters = re.findall(r"\.param\s+.*?(\w+)\s*(?:,|$)", head, re.MULTILINE)
        for name in self._parameters:
            self._slot(name, 8)
        labels, self._jumps = {}, {}  # label -> instruction, place in operands -> label
        for self._line, text in enumerate(body.split("\n"), ptx.count("\n", 0, ptx.index(body)) + 1):
            code = text.split("//")[0].strip()
            if text.startswith("}"):
                break
            if code.endswith(":"):
                labels[code[:-1]] = len(self.instructions) // 5
                continue
            for statement in filter(None, map(str.strip, code.split(";"))):
                self._statement(statement)
        for place, label in self._jumps.items():
            self.operands[place] = labels[label]

    def image(self, arguments: list[int]) -> bytes:
        """Registers of a warp at its start: NaN, except for constants and the launch's arguments."""
        data = bytearray(b"\xff" * self._bytes)
        values = dict(self._constants)
        for name, argument in zip(self._parameters, arguments, strict=True):
            values[self._slots[name][0]] = argument.to_bytes(8, "little")
        for offset, lane in values.items():
            data[offset : offset + LANES * len(lane)] = lane * LANES
        return bytes(data)

    def _unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"emulator: PTX line {self._line}: {what}")

    def _slot(self, name: str, size: int) -> int:
        """Offset of a register, parameter or constant, which gets its place when it is first seen."""
        if name not in self._slots:
            self._slots[name] = (self._bytes, size)
            self._bytes += LANES * size
        offset, known = self._slots[name]
        if size != known:
            raise self._unsupported(f"{name} has {known} bytes where the instruction takes {size}")
        return offset

    def _width(self, register: str) -> int:
        """Bytes of a lane of a register."""
        name = re.fullmatch(r"%([a-z]+)\d+", register)
        if not name or name[1] not in self._classes:
            raise self._unsupported(f"operand {register}")
        return self._classes[name[1]]

    def _value(self, text: str, size: int) -> int:
        """Offset of an operand: a register, a constant or an address in shared memory."""
        if text in self._slots:
            return self._slot(text, size)
        if found := re.fullmatch(r"global_smem(?:\+(\d+))?|(%tid\.[yz])", text):
            number = int(found[1] or 0)
        elif found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            number = int(found[1], 16)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0) % 256**size
        else:
            self._slot(text, self._width(text))
            return self._slot(text, size)
        offset = self._slot(f"{number} in {size} bytes", size)
        self._constants[offset] = number.to_bytes(size, "little")
        return offset

    def _address(self, text: str, size: int) -> list[int]:
        """Base and displacement of [base + displacement]."""
        found = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        return [self._value(found[1], size), int(found[2] or 0)]

    def _emit(self, handler: str, operands: list[int], guard: tuple[int, int] = (-1, 0)) -> None:
        self.instructions.extend((_HANDLERS[handler], self._line, *guard, len(self.operands)))
        self.operands.extend(operands)

    def _statement(self, text: str) -> None:
        """Adds the instructions of one statement."""
        if found := re.fullmatch(r"\.reg\s+\.(\w+)\s+%([a-z]+)<\d+>", text):
            self._classes[found[2]] = _size(found[1])
            return
        negated, predicate, mnemonic, rest = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)", text).groups()
        guard = (self._value(predicate, 1), int(negated == "!")) if predicate else (-1, 0)
        operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest) if part.strip()]
        if _NOTHING.match(mnemonic):
            return
        if mnemonic in ("bra", "bra.uni"):
            self._jumps[len(self.operands)] = operands[0]
            self._emit("branch", [0], guard)
        elif mnemonic in ("ret", "exit"):
            self._emit("leave", [], guard)
        elif found := re.fullmatch(r"(ld|st)\.(global|shared)(?:\.L[12]::\w+)*(?:\.v(\d))?\.[bus](\d+)", mnemonic):
            self._memory(*found.groups(), operands, guard)
        elif mnemonic.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
            addresses = [*self._address(operands[0], 4), *self._address(operands[1], 8)]
            self._emit("copy_async", [*addresses, int(operands[2], 0), self._value(operands[-1], 4)], guard)
        elif not self._compute(mnemonic, operands, guard):
            if predicate:
                raise self._unsupported(text)
            self._warp_wide(mnemonic, operands)

    def _memory(self, kind: str, space: str, count: str | None, width: str, operands: list[str], guard) -> None:
        address, data = operands[:: 1 if kind == "st" else -1]
        registers = []
        for one in _elements(data):
            size = self._width(one) if one.startswith("%") else int(width) // 8
            registers += [self._value(one, size), size]
        where = [int(space == "global"), *self._address(address, 8 if space == "global" else 4)]
        form = [int(width) // 8, int(count or 1)]
        self._emit(f"move<{str(kind == 'st').lower()}>", [*where, *form, *registers], guard)

    def _compute(self, mnemonic: str, operands: list[str], guard: tuple[int, int]) -> bool:
        """Adds an instruction of INSTRUCTIONS, if it is one. A guarded one selects the new or the old result."""
        if mnemonic.startswith("ld.param"):  # a parameter has 8 bytes here
            mnemonic, operands = f"cvt.u{8 * self._width(operands[0])}.u64", [operands[0], operands[1][1:-1]]
        elif found := re.fullmatch(r"(setp\.\w+)\.(and|or)(\.\w+)", mnemonic):
            self._compute(found[1] + found[3], ["%scratch0", *operands[1:3]], guard)
            mnemonic, operands = f"{found[2]}.pred", [operands[0], "%scratch0", operands[3]]
        elif mnemonic.startswith("mov.b") and "{" in operands[0]:
            for half, register in enumerate(_elements(operands[0])):
                if register != "_":
                    self._compute(f"unpack{half}{mnemonic[3:]}", [register, operands[1]], guard)
            return True
        elif mnemonic.startswith("mov.b") and "{" in operands[1]:
            mnemonic, operands = f"pack{mnemonic[3:]}", [operands[0], *_elements(operands[1])]
        if mnemonic not in INSTRUCTIONS:
            return False
        types = INSTRUCTIONS[mnemonic][0].split()
        if len(operands) != len(types) or (guard[0] >= 0 and types[0] == "pred"):
            raise self._unsupported(f"this form of {mnemonic}")
        places = [self._value(operand, _size(kind)) for operand, kind in zip(operands, types, strict=True)]
        body = _BODIES[INSTRUCTIONS[mnemonic]]
        if guard[0] < 0:
            self._emit(body, places)
            return True
        size = _size(types[0])
        result = self._slot(f"result of {size} bytes", size)
        self._emit(body, [result, *places[1:]])
        either = (places[0], result) if guard[1] else (result, places[0])
        self._emit(_BODIES[INSTRUCTIONS[f"selp.b{8 * size}"]], [places[0], *either, guard[0]])
        return True

    def _warp_wide(self, mnemonic: str, operands: list[str]) -> None:
        """Adds an instruction of a whole warp."""

        def words(text: str) -> list[int]:
            return [self._value(one, 4) for one in _elements(text)]

        if mnemonic in ("bar.sync", "barrier.sync") and operands == ["0"]:
            self._emit("barrier", [])
        elif mnemonic == "cp.async.commit_group":
            self._emit("commit_group", [])
        elif mnemonic == "cp.async.wait_group":
            self._emit("wait_group", [int(operands[0], 0)])
        elif found := re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", mnemonic):
            to, _, inside = operands[0].partition("|")
            sources = [self._value(one, 4) for one in (to, *operands[1:4])]
            mode = ("up", "down", "bfly", "idx").index(found[1])
            self._emit("shuffle", [mode, *sources, self._value(inside, 1) if inside else -1])
        elif found := re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", mnemonic):
            address, data = operands[:: 1 if found[1] == "st" else -1]
            where = [int(found[2]), int(bool(found[3])), *self._address(address, 4)]
            self._emit(f"move_matrix<{str(found[1] == 'st').lower()}>", [*where, *words(data)])
        elif found := re.fullmatch(r"mma\.sync\.aligned\.m16n8k(?:16|8)\.row\.col\.f32\.(\w+)\.\1\.f32", mnemonic):
            d, a, b, c = map(words, operands)
            self._emit("mma", [KINDS.index(found[1]), *a, *b, *c, *d])
        elif found := re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:16|8)\.f32\.(\w+)\.\2", mnemonic):
            d, a, b, keep, *flags = operands
            signs, transposed = [int(flag) for flag in flags[:2]], [int(flag) for flag in flags[2:]]
            transposed = [0] * (2 - len(transposed)) + transposed  # only b's where a is in registers
            left = words(a) if a.startswith("{") else [self._value(a, 8), 0, 0, 0]
            head = [KINDS.index(found[2]), int(found[1]), self._value(keep, 1), *signs, *transposed]
            self._emit("wgmma", [*head, int(a.startswith("{")), *left, self._value(b, 8), *words(d)])
        else:
            raise self._unsupported(mnemonic)
