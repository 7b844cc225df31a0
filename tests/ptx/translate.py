"""Translates PTX, as Triton emits it for sm_80 and sm_90, into a program for the interpreter in runtime.h.

INSTRUCTIONS is the table of all instructions that compute each lane by itself: mnemonic -> types and C++ expression.
The interpreter has a handler for each, so it is built once and not once per kernel. Memory, tensor cores, shuffles and
control flow have handlers in runtime.h, and a branch of `Translation.other` here. An instruction that is in neither
raises Unsupported, which names it: atomics, TMA and mbarriers, clusters, FP8, tcgen05.
"""

import re
import struct
from array import array
from collections.abc import Iterator

LANES = 32
SIZES = {"pred": 1, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "u64": 8, "s64": 8}  # bytes; all others 4
SPECIAL = ("%tid.x", "%laneid", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")

SIGNED, UNSIGNED, BITS = "s16 s32 s64", "u16 u32 u64", "b16 b32 b64"
INTEGERS, FLOATS, HALVES = f"{SIGNED} {UNSIGNED}", "f32", "f16 bf16"
# Mnemonic with T for each of the types; types of destination and sources; C++ expression of the sources a, b, c and d.
# In the expression, T is the C++ type. Bits (b32) are unsigned integers (u32).
FAMILIES = (
    ("mov.T", f"{BITS} {INTEGERS} f32", "T T", "a"),
    ("add.T", INTEGERS, "T T T", "a + b"),
    ("sub.T", INTEGERS, "T T T", "a - b"),
    ("mul.lo.T", INTEGERS, "T T T", "a * b"),
    ("mad.lo.T", INTEGERS, "T T T T", "a * b + c"),
    ("mul.hi.T", "s32", "T T T", "(s64)a * b >> 32"),
    ("mul.hi.T", "u32", "T T T", "(u64)a * b >> 32"),
    ("mul.wide.T", "s32", "s64 T T", "(s64)a * b"),
    ("mul.wide.T", "u32", "u64 T T", "(u64)a * b"),
    ("mul.wide.T", "s16", "s32 T T", "a * b"),
    ("mul.wide.T", "u16", "u32 T T", "(u32)a * b"),
    ("mad.wide.T", "s32", "s64 T T s64", "(s64)a * b + c"),
    ("mad.wide.T", "u32", "u64 T T u64", "(u64)a * b + c"),
    ("div.T", INTEGERS, "T T T", "quotient<T>(a, b)"),
    ("rem.T", INTEGERS, "T T T", "remainder_of<T>(a, b)"),
    ("min.T", INTEGERS, "T T T", "a < b ? a : b"),
    ("max.T", INTEGERS, "T T T", "a > b ? a : b"),
    ("abs.T", SIGNED, "T T", "a < 0 ? -a : a"),
    ("neg.T", SIGNED, "T T", "-a"),
    ("and.T", BITS, "T T T", "a & b"),
    ("or.T", BITS, "T T T", "a | b"),
    ("xor.T", BITS, "T T T", "a ^ b"),
    ("not.T", BITS, "T T", "~a"),
    ("mov.T", "pred", "T T", "a != 0"),
    ("and.T", "pred", "T T T", "a && b"),
    ("or.T", "pred", "T T T", "a || b"),
    ("xor.T", "pred", "T T T", "!a != !b"),
    ("not.T", "pred", "T T", "!a"),
    ("shl.T", BITS, "T T u32", "b < 8 * sizeof a ? a << b : 0"),
    ("shr.T", f"{UNSIGNED} {BITS}", "T T u32", "b < 8 * sizeof a ? a >> b : 0"),
    ("shr.T", SIGNED, "T T u32", "a >> std::min<u32>(b, 8 * sizeof a - 1)"),
    ("shf.l.wrap.T", "b32", "T T T u32", "((u64)b << 32 | a) << (c & 31) >> 32"),
    ("shf.r.wrap.T", "b32", "T T T u32", "((u64)b << 32 | a) >> (c & 31)"),
    ("bfe.T", "u32 s32", "T T u32 u32", "extract(a, b, c)"),
    ("prmt.T", "b32", "T T T T", "permute(a, b, c)"),
    ("popc.T", "b32", "u32 T", "__builtin_popcount(a)"),
    ("selp.T", f"{BITS} {INTEGERS} f32", "T T T pred", "c ? a : b"),
    ("pack.T", "b32", "T b16 b16", "(u32)b << 16 | a"),  # mov.b32 r, {a, b}
    ("pack.T", "b64", "T b32 b32", "(u64)b << 32 | a"),
    ("unpack0.T", "b32", "b16 T", "a"),  # mov.b32 {r, _}, a
    ("unpack1.T", "b32", "b16 T", "a >> 16"),  # mov.b32 {_, r}, a
    ("unpack0.T", "b64", "b32 T", "a"),
    ("unpack1.T", "b64", "b32 T", "a >> 32"),
    *((f"setp.{name}.T", f"{BITS} {INTEGERS} f32", "pred T T", f"a {sign} b")
      for name, sign in {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()),
    ("setp.ne.T", f"{BITS} {INTEGERS}", "pred T T", "a != b"),
    ("setp.ne.T", FLOATS, "pred T T", "a < b || a > b"),  # false where one is NaN
    *((f"setp.{name}u.T", FLOATS, "pred T T", f"!(a {sign} b)")  # true where one is NaN
      for name, sign in {"ne": "==", "ge": "<", "gt": "<=", "le": ">", "lt": ">="}.items()),
    ("setp.equ.T", FLOATS, "pred T T", "!(a < b || a > b)"),
    ("setp.nan.T", FLOATS, "pred T T", "a != a || b != b"),
    ("setp.num.T", FLOATS, "pred T T", "a == a && b == b"),
    *((f"cvt.{to}.T", INTEGERS, f"{to} T", "a") for to in INTEGERS.split()),
    ("cvt.rn.f32.T", INTEGERS, "f32 T", "a"),
    ("cvt.rzi.T.f32", INTEGERS, "T f32", "saturated<T>(std::trunc(a))"),
    ("cvt.rni.T.f32", INTEGERS, "T f32", "saturated<T>(std::nearbyint(a))"),
    ("cvt.f32.T", HALVES, "f32 T", "a"),
    ("cvt.rn.T.f32", HALVES, "T f32", "a"),
    ("cvt.rn.Tx2.f32", HALVES, "Tx2 f32 f32", "{T(b), T(a)}"),
    ("cvt.rna.tf32.f32", "", "b32 b32", "(a + 0x1000u) & 0xffffe000u"),
)  # fmt: skip
# Of float32, each also with .ftz, which makes subnormal operands and results 0.
SINGLE = {
    "add": "a + b", "add.rn": "a + b", "sub": "a - b", "sub.rn": "a - b", "mul": "a * b", "mul.rn": "a * b",
    "fma.rn": "std::fma(a, b, c)", "min": "minimum(a, b)", "max": "maximum(a, b)", "abs": "std::fabs(a)", "neg": "-a",
    "div.full": "a / b", "div.rn": "a / b", "div.approx": "a / b", "rcp.approx": "1.f / a", "rcp.rn": "1.f / a",
    "sqrt.approx": "std::sqrt(a)", "sqrt.rn": "std::sqrt(a)", "rsqrt.approx": "1.0 / std::sqrt((double)a)",
    "ex2.approx": "std::exp2((double)a)", "lg2.approx": "std::log2((double)a)", "tanh.approx": "std::tanh((double)a)",
    "cvt.rni.f32": "std::nearbyint(a)", "cvt.rzi.f32": "std::trunc(a)", "cvt.rmi.f32": "std::floor(a)",
}  # fmt: skip
# Of f16 and bf16 and of pairs of them: computed in double, rounded once.
HALF = {
    "add": "a + b", "add.rn": "a + b", "sub": "a - b", "mul": "a * b", "mul.rn": "a * b", "fma.rn": "a * b + c",
    "neg": "-a", "min": "minimum(a, b)", "max": "maximum(a, b)",
}  # fmt: skip


class Unsupported(Exception):
    """An instruction, or a form of one, that the emulator does not know."""


def _wrapped(expression: str, form: str) -> str:
    """The expression with each of its sources put into a form such as "flush({})"."""
    return re.sub(r"\b[abc]\b", lambda source: form.format(source[0]), expression)


def _entries() -> Iterator[tuple[str, list[str], str]]:
    """Every (mnemonic, types of destination and sources, C++ expression)."""
    for mnemonic, types, signature, expression in FAMILIES:
        for name in types.split() or [""]:
            kind = name.replace("b", "u") if name in BITS.split() else name  # the C++ type
            fields = [field.replace("T", kind) if "T" in field else field for field in signature.split()]
            fields = [field.replace("b", "u") if field in BITS.split() else field for field in fields]
            yield mnemonic.replace("T", name), fields, re.sub(r"\bT\b", kind, expression)
    for name, expression in SINGLE.items():
        fields = ["f32"] * (2 + (", b" in expression or " b" in expression) + (", c" in expression))
        yield f"{name}.f32", fields, expression
        yield f"{name}.ftz.f32", fields, f"flush({_wrapped(expression, 'flush({})')})"
    for name, expression in HALF.items():
        count = 2 + (" b" in expression) + (" c" in expression)
        for kind in HALVES.split():
            one = f"{kind}({_wrapped(expression, '(double){}')})"
            yield f"{name}.{kind}", [kind] * count, one
            low, high = (_wrapped(expression, f"(double){{}}.{half}") for half in ("low", "high"))
            yield f"{name}.{kind}x2", [f"{kind}x2"] * count, f"{{{kind}({low}), {kind}({high})}}"


INSTRUCTIONS = {mnemonic: (fields, expression) for mnemonic, fields, expression in _entries()}
_BODIES = sorted({(tuple(fields), expression) for fields, expression in INSTRUCTIONS.values()})
_OTHERS = (
    "load", "store", "copy_async", "commit_group", "wait_group", "load_matrix", "store_matrix", "shuffle", "branch",
    "barrier", "leave", "mma", "wgmma",
)  # fmt: skip
_HANDLER = {
    **{name: _BODIES.index((tuple(fields), expression)) for name, (fields, expression) in INSTRUCTIONS.items()},
    **{name: len(_BODIES) + index for index, name in enumerate(_OTHERS)},
}
# They order what the emulator does at once and in order anyway, so they do nothing here.
_NOTHING = re.compile(
    r"bar\.warp\.sync|fence\.|membar\.|wgmma\.(fence|commit_group|wait_group)\.|griddepcontrol\.|\.(loc|pragma|file)"
)


def handlers() -> str:
    """C++ source of the handlers of INSTRUCTIONS and of the table of all handlers, which follows runtime.h."""
    lines = []
    for index, (fields, expression) in enumerate(_BODIES):
        sources = [f"const {kind} *p{name} = values<{kind}>(w, o[{place}]);"
                   for place, (name, kind) in enumerate(zip("abc", fields[1:], strict=False), 1)]  # fmt: skip
        loads = [f"const {kind} {name} = p{name}[l];" for name, kind in zip("abc", fields[1:], strict=False)]
        lines += [
            f"static void compute{index}(Warp& w, const int* o) {{ {fields[0]}* to = values<{fields[0]}>(w, o[0]);",
            *sources,
            "#pragma GCC ivdep",
            f"for (int l = 0; l < LANES; ++l) {{ {' '.join(loads)} to[l] = {expression}; }} }}",
        ]
    names = [*(f"compute{index}" for index in range(len(_BODIES))), *_OTHERS]
    return "\n".join([*lines, f"const Handler HANDLERS[] = {{{', '.join(names)}}};"])


class Program:
    """A kernel for the interpreter: instructions, their operands, and the registers of a warp at its start."""

    def __init__(self, ptx: str):
        head, body = ptx[ptx.index(".visible .entry") :].split("\n{\n", 1)
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
        self.instructions, self.operands = array("i"), array("i")  # the former five numbers each, struct Instruction
        self._slots: dict[str, tuple[int, int]] = {}  # register, parameter or constant -> offset, bytes of a lane
        self._constants: dict[int, bytes] = {}  # offset -> bytes of a lane
        self._classes = {"scratch": 1}  # first letters of registers -> bytes of a lane
        self._labels: dict[str, int] = {}  # -> index of an instruction
        self._size = 0
        for name in SPECIAL:
            self._slot(name, 4)
        self._parameters = re.findall(r"\.param\s+.*?(\w+)\s*(?:,|$)", head, re.MULTILINE)
        for name in self._parameters:
            self._slot(name, 8)
        self._line = ptx.count("\n", 0, ptx.index(body))
        jumps = []
        for text in body.split("\n"):
            self._line += 1
            if text.startswith("}"):
                break
            code = text.split("//")[0].strip()
            if code.endswith(":"):
                self._labels[code[:-1]] = len(self.instructions) // 5
                continue
            for statement in filter(None, (part.strip() for part in code.split(";"))):
                label = self._statement(statement)
                if label:
                    jumps.append((len(self.operands) - 1, label))
        for place, label in jumps:
            self.operands[place] = self._labels[label]

    def image(self, arguments: list[int]) -> bytes:
        """Registers of a warp at its start: NaN, except for constants and the launch's arguments."""
        if len(arguments) != len(self._parameters):
            raise Unsupported(f"{len(self._parameters)} parameters for {len(arguments)} arguments")
        data = bytearray(b"\xff" * self._size)
        values = self._constants | {
            self._slots[name][0]: argument.to_bytes(8, "little")
            for name, argument in zip(self._parameters, arguments, strict=True)
        }
        for offset, lane in values.items():
            data[offset : offset + LANES * len(lane)] = lane * LANES
        return bytes(data)

    def _slot(self, name: str, size: int) -> int:
        """Offset of a register or constant, which gets its place when it is first seen."""
        if name not in self._slots:
            self._slots[name] = (self._size, size)
            self._size += LANES * size
        if self._slots[name][1] != size:
            raise self._unsupported(f"{name}, of another size than the instruction")
        return self._slots[name][0]

    def _unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"PTX line {self._line}: {what}")

    def _register(self, text: str) -> tuple[int, int]:
        """Offset and size of a register."""
        name = re.fullmatch(r"%([a-z]+)\d+", text)
        if not name or name[1] not in self._classes:
            raise self._unsupported(f"operand {text}")
        size = self._classes[name[1]]
        return self._slot(text, size), size

    def _value(self, text: str, size: int) -> int:
        """Offset of an operand of this size: a register, a constant or an address in shared memory."""
        if text in SPECIAL or re.fullmatch(r"%[a-z]+\d+", text):
            return self._slot(text, size) if text in SPECIAL else self._slot(text, self._expect(text, size))
        if text.startswith("global_smem"):
            number = int(text.partition("+")[2] or 0)
        elif text in ("%tid.y", "%tid.z"):
            number = 0
        elif found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            number = int(found[1], 16)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0) & 256**size - 1
        else:
            raise self._unsupported(f"operand {text}")
        offset = self._slot(f"{number} in {size} bytes", size)
        self._constants[offset] = number.to_bytes(size, "little")
        return offset

    def _expect(self, register: str, size: int) -> int:
        if self._register(register)[1] != size:
            raise self._unsupported(f"{register}, of another size than the instruction")
        return size

    def _address(self, text: str, size: int) -> list[int]:
        """Base and displacement of [base + displacement]."""
        found = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        return [self._value(found[1], size), int(found[2] or 0)]

    def _emit(self, handler: str, operands: list[int], guard: tuple[int, int] = (-1, 0)) -> None:
        self.instructions.extend((_HANDLER[handler], self._line, *guard, len(self.operands)))
        self.operands.extend(operands)

    def _statement(self, text: str) -> str | None:
        """Adds the instructions of one statement. Returns the label if it is a branch."""
        if found := re.fullmatch(r"\.reg\s+\.(\w+)\s+%([a-z]+)<\d+>", text):
            self._classes[found[2]] = 1 if found[1] == "pred" else int(found[1][1:]) // 8
            return None
        found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)", text)
        negated, predicate, mnemonic, rest = found.groups()
        guard = (self._value(predicate, 1), int(negated == "!")) if predicate else (-1, 0)
        operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest) if part.strip()]
        if _NOTHING.match(mnemonic):
            return None
        if mnemonic in ("bra", "bra.uni"):
            self._emit("branch", [0], guard)
            return operands[0]
        if mnemonic in ("ret", "exit"):
            self._emit("leave", [], guard)
        elif mnemonic.startswith(("ld.global", "ld.shared", "st.global", "st.shared")):
            self._memory(mnemonic, operands, guard)
        elif mnemonic.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
            to, source, size = self._address(operands[0], 4), self._address(operands[1], 8), int(operands[2], 0)
            valid = self._value(operands[3] if len(operands) > 3 else operands[2], 4)
            self._emit("copy_async", [*to, *source, size, valid], guard)
        elif self._compute(mnemonic, operands, guard):
            pass
        elif predicate:
            raise self._unsupported(text)
        else:
            self._other(mnemonic, operands)
        return None

    def _memory(self, mnemonic: str, operands: list[str], guard: tuple[int, int]) -> None:
        found = re.fullmatch(
            r"(ld|st)\.(global|shared)(?:::cta)?(?:\.(?:L1|L2)::\w+)*(?:\.v(\d))?\.[bus](8|16|32|64)", mnemonic
        )
        if not found:
            raise self._unsupported(mnemonic)
        kind, space, count, width = found.groups()
        address, data = operands[:: 1 if kind == "st" else -1]
        registers = [
            self._register(one) if one.startswith("%") else (self._value(one, int(width) // 8), int(width) // 8)
            for one in _elements(data)
        ]
        where = [int(space == "global"), *self._address(address, 8 if space == "global" else 4)]
        form = [int(width) // 8, int(count or 1)]
        self._emit("load" if kind == "ld" else "store", [*where, *form, *(n for one in registers for n in one)], guard)

    def _compute(self, mnemonic: str, operands: list[str], guard: tuple[int, int]) -> bool:
        """Adds an instruction of INSTRUCTIONS, if it is one. A guarded one selects between new and old result."""
        base = mnemonic
        if mnemonic.startswith("ld.param"):  # a parameter has 8 bytes here
            place, size = self._register(operands[0])
            if size > 1:
                self._emit(f"cvt.u{8 * size}.u64", [place, self._slot(operands[1][1:-1], 8)])
            return size > 1
        if found := re.fullmatch(r"(setp\.\w+)\.(and|or)(\.\w+)", mnemonic):
            self._compute(found[1] + found[3], ["%scratch0", *operands[1:3]], guard)
            return self._compute(f"{found[2]}.pred", [operands[0], "%scratch0", operands[3]], guard)
        if mnemonic.startswith("mov.b") and "{" in operands[0]:
            for half, register in enumerate(_elements(operands[0])):
                if register != "_":
                    self._compute(f"unpack{half}{mnemonic[3:]}", [register, operands[1]], guard)
            return True
        if mnemonic.startswith("mov.b") and "{" in operands[1]:
            base, operands = f"pack{mnemonic[3:]}", [operands[0], *_elements(operands[1])]
        if base not in INSTRUCTIONS:
            return False
        fields, _ = INSTRUCTIONS[base]
        if len(operands) != len(fields):
            raise self._unsupported(f"{mnemonic} with {len(operands)} operands")
        sizes = [SIZES.get(field, 4) for field in fields]
        places = [self._value(operand, size) for operand, size in zip(operands, sizes, strict=True)]
        if guard[0] < 0:
            self._emit(base, places)
        elif sizes[0] == 1:
            raise self._unsupported(f"guarded {mnemonic}")
        else:
            result = self._slot(f"result of {sizes[0]} bytes", sizes[0])
            self._emit(base, [result, *places[1:]])
            new, old = (places[0], result) if guard[1] else (result, places[0])
            self._emit(f"selp.b{8 * sizes[0]}", [places[0], new, old, guard[0]])
        return True

    def _other(self, mnemonic: str, operands: list[str]) -> None:
        """Adds an instruction of several lanes."""

        def words(text: str) -> list[int]:
            return [self._value(one, 4) for one in _elements(text)]

        if mnemonic in ("bar.sync", "barrier.sync") and operands == ["0"]:
            self._emit("barrier", [])
        elif mnemonic == "cp.async.commit_group":
            self._emit("commit_group", [])
        elif mnemonic == "cp.async.wait_group":
            self._emit("wait_group", [int(operands[0], 0)])
        elif mnemonic == "cp.async.wait_all":
            self._emit("commit_group", [])
            self._emit("wait_group", [0])
        elif found := re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", mnemonic):
            to, _, inside = operands[0].partition("|")
            mode = ("up", "down", "bfly", "idx").index(found[1])
            sources = [self._value(one, 4) for one in (to, *operands[1:4])]
            self._emit("shuffle", [mode, *sources, self._value(inside, 1) if inside else -1])
        elif found := re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", mnemonic):
            address, data = operands[:: 1 if found[1] == "st" else -1]
            where = [int(found[2]), int(bool(found[3])), *self._address(address, 4)]
            self._emit("load_matrix" if found[1] == "ld" else "store_matrix", [*where, *words(data)])
        elif found := re.fullmatch(
            r"mma\.sync\.aligned\.m16n8k(?:16|8)\.row\.col\.f32\.(f16|bf16|tf32)\.\1\.f32", mnemonic
        ):
            d, a, b, c = map(words, operands)
            self._emit("mma", [("f16", "bf16", "tf32").index(found[1]), *a, *b, *c, *d])
        elif found := re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+\.f32\.(f16|bf16|tf32)\.\2", mnemonic
        ):
            d, a, b, keep, *flags = operands
            signs, transposed = [int(flag) for flag in flags[:2]], [int(flag) for flag in flags[2:]]
            in_registers = a.startswith("{")
            transposed = [0] * (2 - len(transposed)) + transposed  # only b's where a is in registers
            head = [("f16", "bf16", "tf32").index(found[2]), int(found[1]), self._value(keep, 1), *signs, *transposed]
            left = words(a) if in_registers else [self._value(a, 8), 0, 0, 0]
            self._emit("wgmma", [*head, int(in_registers), *left, self._value(b, 8), *words(d)])
        else:
            raise self._unsupported(mnemonic)


def _elements(text: str) -> list[str]:
    """Members of {a, b}, or the only one."""
    return [part.strip() for part in text.strip("{} ").split(",")]
