"""Writes a kernel of PTX as a function of C++."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from ptx_text import Kernel, Module, Untranslatable, operands, statements

TYPE = re.compile(r"[busf](8|16|32|64)(x2)?|bf16(x2)?|pred")
REGISTER_BITS = {"pred": "bool", "b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"}
COMPARISON = re.compile("eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan")
SPACES = ("global", "shared", "local", "param", "const")
MEMORY_MODIFIER = re.compile(
    "|".join(SPACES) + "|weak|relaxed|acquire|release|acq_rel|volatile|gpu|sys|nc|v2|v4"
    "|add|exch|min|max|or|cas"
)


@dataclass
class Writer:
    """The C++ of one kernel."""

    module: Module
    kernel: Kernel
    lines: list[str] = field(default_factory=list)
    local: set[str] = field(default_factory=set)
    registers: dict[str, str] = field(default_factory=dict)  # by name, or by what numbers follow
    instruction: int = 0
    # What runs between two labels or branches: how many instructions of a line and class.
    blocks: list[Counter[tuple[str, str]]] = field(default_factory=list)
    block: Counter[tuple[str, str]] = field(default_factory=Counter)  # not yet ended
    line: str = ""

    def value(self, text: str) -> str:
        """The bits of a register, number, symbol or special register."""
        if text.startswith("%"):
            name = text[1:]
            if re.fullmatch(r"(tid|ntid|ctaid|nctaid)\.[xyz]", name):
                of = {
                    "tid": "threadIdx",
                    "ntid": "blockDim",
                    "ctaid": "blockIdx",
                    "nctaid": "gridDim",
                }
                variable, axis = name.split(".")
                return f"{of[variable]}.{axis}"
            if name in ("laneid", "envreg1", "envreg2"):
                return f"{name}()"
            if name not in self.registers and name.rstrip("0123456789") not in self.registers:
                raise Untranslatable(f"register {text}")
            return f"{name}_"  # %f32 is not the type f32
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return f"0x{m[1]}u"
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return f"0x{m[1]}ull"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return f"0x{int(text.rstrip('U'), 0) & (2**64 - 1):x}ull"
        if text in self.kernel.parameters:
            return f"reinterpret_cast<u64>(parameters[{self.kernel.parameters.index(text)}])"
        if text in self.module.shared:
            size, align = self.module.shared[text]
            if size == 0:
                return "0u"
            return f"static_shared(window, &shared_{identifier(text)}, {size}, {align})"
        if text in self.local:
            return f"reinterpret_cast<u64>({identifier(text)})"
        raise Untranslatable(f"operand {text}")

    def condition(self, text: str) -> str:
        return "!" + self.value(text[1:]) if text.startswith("!") else self.value(text)

    def typed(self, text: str, kind: str) -> str:
        if text.startswith("{"):
            parts = [self.value(p) for p in operands(text[1:-1])]
            return f"pack<{kind}>({', '.join(parts)})"
        return f"as<{kind}>({self.value(text)})"

    def address(self, text: str, space: str) -> str:
        """A pointer of the host's."""
        inside = text.strip("[]")
        m = re.fullmatch(r"(.+?)(?:\+(-?\d+))?", inside)
        if m is None:
            raise Untranslatable(f"address {text}")
        base, offset = self.value(m[1].strip()), int(m[2] or 0)
        return (
            f"in_shared(window, {base}, {offset})"
            if space == "shared"
            else f"pointer({base}, {offset})"
        )

    def emit(self, statement: str) -> None:
        self.lines.append(f"  {statement}")

    def write(self) -> str:
        numbered: dict[str, str] = {}
        place = ""
        for s in statements(self.kernel.body):
            if re.match(r"\.loc\s", s):
                _, file, line, *_ = s.split()
                if int(line):
                    path = self.module.files[int(file)]
                    place = f'#line {line} "{path}"'
                    self.line = f"{path.rsplit('/', 1)[-1]}:{line}"
            elif s.startswith(".reg"):
                kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", s).groups()  # type: ignore[union-attr]
                bits = REGISTER_BITS[kind.replace("f", "b").replace("u", "b").replace("s", "b")]
                for name in names.split(","):
                    if m := re.fullmatch(r"%([a-z]+)<(\d+)>", name.strip()):
                        numbered[m[1]] = bits
                    else:
                        self.registers[name.strip()[1:]] = bits
                        self.emit(f"{bits} {name.strip()[1:]}_ = 0;")
                self.registers.update(numbered)
            elif s.startswith((".pragma", ".shared")):
                continue
            elif m := re.fullmatch(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", s):
                self.emit(f"alignas({m[1]}) unsigned char {identifier(m[2])}[{m[3]}];")
                self.local.add(m[2])
            elif s in "{}":
                self.emit(s)
            elif s.endswith(":"):
                self.end_block()
                self.lines.append(f"{identifier(s[:-1])}:;")
            else:
                # Only what can end in a fault says where it is.
                if place and re.match(
                    r"(@!?%\w+\s+)?(ld|st|atom|red|cp|trap|bar|shfl|vote|redux|mma|ldm)", s
                ):
                    self.lines.append(place)
                    place = ""
                self.translate(s)
        used = sorted(set(re.findall(rf"\b(?:{'|'.join(numbered)})\d+_\b", "\n".join(self.lines))))
        declared = []
        for prefix, bits in numbered.items():
            names = [f"{r} = 0" for r in used if r.rstrip("_0123456789") == prefix]
            declared += [
                f"  {bits} {', '.join(names[i : i + 8])};" for i in range(0, len(names), 8)
            ]
        head = [
            f'// {self.kernel.name}\n#line 1 "registers"',
            f"u64 {self.counters}[{len(self.blocks) + 1}];",
            f"void {identifier(self.kernel.name)}(const void* const* parameters) {{",
            "  unsigned char* const window = shared_window();",
            "  static_cast<void>(window), static_cast<void>(parameters);",
        ]
        return "\n".join([*head, *declared, *self.lines, "}", ""])

    def translate(self, statement: str) -> None:
        self.instruction += 1
        condition = ""
        if m := re.match(r"@(!?)%(\w+)\s+", statement):
            condition = f"if ({m[1]}{m[2]}_) "
            statement = statement[m.end() :]
        opcode, _, rest = statement.partition(" ")
        opcode, rest = opcode.strip(), rest.strip()
        if "\t" in opcode:
            opcode, _, more = opcode.partition("\t")
            rest = f"{more} {rest}".strip()
        name, *parts = re.sub(r"::", "_", opcode).split(".")
        self.block[self.line, class_of(name, parts)] += 1
        if name in ("bra", "ret", "exit"):
            self.end_block()
        self.emit(condition + self.meaning(name, parts, operands(rest)))

    def end_block(self) -> None:
        if self.block:
            self.emit(f"++{self.counters}[{len(self.blocks)}];")
            self.blocks.append(self.block)
        self.block = Counter()

    @property
    def counters(self) -> str:
        return f"counters_{identifier(self.kernel.name)}"

    def meaning(self, name: str, parts: list[str], args: list[str]) -> str:
        """One C++ statement."""
        if name == "bra":
            return f"goto {identifier(args[0])};"
        if name in ("ret", "exit"):
            return "return;"
        if name in ("ld", "st", "atom", "red", "prefetch"):
            return getattr(self, f"memory_{name}")(parts, args)
        if name == "cp":
            return self.async_copy(parts, args)
        if name in ("shfl", "vote", "redux"):
            return self.collective(name, parts, args)
        if name == "mma":
            return self.mma(parts, args)
        if name == "ldmatrix":
            return self.ldmatrix(parts, args)
        if name in ("bar", "barrier"):
            # barrier.sync is bar.sync for warps whose lanes may come apart.
            what = "_".join([p for p in parts if p not in ("aligned", "cta")])
            return f"bar_{what}({', '.join(self.value(a) for a in args)});"
        if name in ("trap", "membar", "fence", "nanosleep"):
            return "_".join([name, *parts]) + "();"
        if name == "cvta":
            space = parts[-2]
            way = "to" if "to" in parts else "from"
            address = self.typed(args[1], parts[-1])
            return f"put({self.value(args[0])}, cvta_{way}_{space}(window, {address}));"
        if name == "mov":
            return self.move(parts[-1], args)
        if name == "setp":
            return self.compare(parts, args)
        if name == "selp":
            a, b = (self.typed(x, parts[-1]) for x in args[1:3])
            return f"put({self.value(args[0])}, {self.value(args[3])} ? {a} : {b});"
        return self.arithmetic(name, parts, args)

    def arithmetic(self, name: str, parts: list[str], args: list[str]) -> str:
        types = [p for p in parts if TYPE.fullmatch(p)]
        modifiers = [p for p in parts if not TYPE.fullmatch(p) and p != "rn"]  # the default
        if not types:
            raise Untranslatable(".".join([name, *parts]))
        function = "_".join([name, *modifiers])
        if name in ("and", "or", "xor", "not"):  # words of C++
            function += "_"
        source = types[-1]
        wide = name == "mad" and "wide" in modifiers
        given = []
        for i, a in enumerate(args[1:]):
            kind = source
            if name in ("shl", "shr") and i == 1:
                kind = "u32"
            if name in ("bfi", "bfe") and i >= len(args) - 3:
                kind = "u32"
            if wide and i == 2:
                kind = source[0] + str(2 * int(source[1:]))
            given.append(self.typed(a, kind))
        return f"put({self.value(args[0])}, {function}<{', '.join(types)}>({', '.join(given)}));"

    def move(self, kind: str, args: list[str]) -> str:
        target, source = args
        if target.startswith("{"):
            into = [self.value(x) if x != "_" else "nothing" for x in operands(target[1:-1])]
            return f"unpack({self.typed(source, kind)}, {', '.join(into)});"
        return f"put({self.value(target)}, {self.typed(source, kind)});"

    def compare(self, parts: list[str], args: list[str]) -> str:
        comparison, *more = parts
        if not COMPARISON.fullmatch(comparison) or len(args) not in (3, 4) or "|" in args[0]:
            raise Untranslatable(".".join(["setp", *parts]))
        kind = more[-1]
        result = f"is_{comparison}({self.typed(args[1], kind)}, {self.typed(args[2], kind)})"
        if len(args) == 4:
            combine = {"and": "&", "or": "|", "xor": "^"}[more[0]]
            other = self.condition(args[3])
            result = f"({result} {combine} {other})"
        return f"{self.value(args[0])} = {result};"

    # ------------------------------------------------------------ memory

    def checked(self, name: str, parts: list[str]) -> str:
        """The memory meant by an instruction of which every modifier is known."""
        for p in parts:
            if not (MEMORY_MODIFIER.fullmatch(p) or TYPE.fullmatch(p)):
                raise Untranslatable(".".join([name, *parts]))
        return next((p for p in parts if p in SPACES), "generic")

    def memory_ld(self, parts: list[str], args: list[str]) -> str:
        space = self.checked("ld", parts)
        kind, count = parts[-1], vector(parts)
        order = next((p for p in parts if p in ("relaxed", "acquire", "volatile")), "weak")
        if space == "param":
            order = "parameter"
        p = self.address(args[1], space)
        targets = operands(args[0][1:-1]) if args[0].startswith("{") else [args[0]]
        into = [self.value(t) if t != "_" else "nothing" for t in targets]
        look = f"{order}_read(p, {size(kind) * count});"
        puts = " ".join(f"put({r}, x[{i}]);" for i, r in enumerate(into))
        return f"{{ auto* p = {p}; {look} const auto x = load<{kind}, {count}>(p); {puts} }}"

    def memory_st(self, parts: list[str], args: list[str]) -> str:
        space = self.checked("st", parts)
        kind, count = parts[-1], vector(parts)
        order = next((p for p in parts if p in ("relaxed", "release", "volatile")), "weak")
        p = self.address(args[0], space)
        sources = operands(args[1][1:-1]) if args[1].startswith("{") else [args[1]]
        look = f"{order}_write(p, {size(kind) * count});"
        values = ", ".join(self.typed(s, kind) for s in sources)
        return f"{{ auto* p = {p}; {look} store<{kind}>(p, {values}); }}"

    def memory_atom(self, parts: list[str], args: list[str]) -> str:
        space = self.checked("atom", parts)
        operation = [
            p for p in parts if p in ("add", "exch", "min", "max", "and", "or", "xor", "cas", "inc")
        ]
        if len(operation) != 1:
            raise Untranslatable(".".join(["atom", *parts]))
        order = next((p for p in parts if p in ("acquire", "release", "acq_rel")), "relaxed")
        kind = parts[-1]
        given = ", ".join(self.typed(a, kind) for a in args[2:])
        into = self.value(args[0]) if args[0] != "_" else "nothing"
        p = self.address(args[1], space)
        return f"put({into}, atom_{operation[0]}<{kind}>({p}, Order::k_{order}, {given}));"

    def memory_red(self, parts: list[str], args: list[str]) -> str:
        return self.memory_atom(parts, ["_", *args])

    def memory_prefetch(self, parts: list[str], args: list[str]) -> str:
        return f"prefetch({self.address(args[0], 'global')});"

    def async_copy(self, parts: list[str], args: list[str]) -> str:
        if parts[:2] == ["async", "commit_group"]:
            return "cp_async_commit();"
        if parts[:2] == ["async", "wait_group"]:
            return f"cp_async_wait({args[0]});"
        if parts[0] != "async" or parts[-2:] != ["shared", "global"]:
            raise Untranslatable(".".join(["cp", *parts]))
        shared, source = self.address(args[0], "shared"), self.address(args[1], "global")
        valid = self.typed(args[3], "s32") if len(args) > 3 else args[2]
        return f"cp_async({shared}, {source}, {args[2]}, {valid});"

    # ------------------------------------------------------------ warps

    def collective(self, name: str, parts: list[str], args: list[str]) -> str:
        if name == "vote":
            mode = parts[1]
            given = f"{self.condition(args[1])}, {self.typed(args[2], 'u32')}"
            return f"put({self.value(args[0])}, vote_{mode}({given}));"
        if name == "redux":
            given = f"{self.typed(args[1], parts[-1])}, {self.typed(args[2], 'u32')}"
            return f"put({self.value(args[0])}, redux_{parts[1]}<{parts[-1]}>({given}));"
        target, _, inside = args[0].partition("|")
        rest = ", ".join(self.typed(a, "u32") for a in args[1:])
        found = self.value(inside) if inside else "nothing"
        return f"put({self.value(target)}, shfl_{parts[1]}({found}, {rest}));"

    def mma(self, parts: list[str], args: list[str]) -> str:
        shape, *types = [p for p in parts if p not in ("sync", "aligned", "row", "col")]
        if shape != "m16n8k16" or types[0] != "f32" or types[3] != "f32":
            raise Untranslatable(".".join(["mma", *parts]))
        d, a, b, c = ([self.value(x) for x in operands(arg[1:-1])] for arg in args)
        sources = "{" + ", ".join(a) + "}, {" + ", ".join(b) + "}, {" + ", ".join(c) + "}"
        puts = " ".join(f"{r} = d[{i}];" for i, r in enumerate(d))
        return (
            f"{{ const auto d = mma_m16n8k16<{types[1]}>({self.instruction}, {sources}); {puts} }}"
        )

    def ldmatrix(self, parts: list[str], args: list[str]) -> str:
        count = next(int(p[1:]) for p in parts if re.fullmatch(r"x\d", p))
        transposed = str("trans" in parts).lower()
        into = [self.value(r) for r in operands(args[0][1:-1])]
        puts = " ".join(f"{r} = x[{i}];" for i, r in enumerate(into))
        p = self.address(args[1], "shared")
        return (
            f"{{ const auto x = ldmatrix<{transposed}, {count}>({self.instruction}, {p}); {puts} }}"
        )


def class_of(name: str, parts: list[str]) -> str:
    """What an instruction is, as far as it matters for how long it takes. Free ones are copies of
    registers and the like, mostly gone in the end; integers of 64 bits are two instructions."""
    kind = parts[-1] if parts else ""
    if name in ("ld", "st", "atom", "red", "cp"):
        if "param" in parts:
            return "free"
        return "shared" if "shared" in parts and name != "cp" else "global"
    if name in ("mma", "ldmatrix"):
        return "matrix" if name == "mma" else "shared"
    if name in ("bar", "barrier", "membar", "fence"):
        return "barrier"
    if name in ("shfl", "vote", "redux"):
        return "warp"
    if name in ("mov", "cvta"):
        return "free"
    if "approx" in parts and kind == "f32":
        return "special"
    if name == "cvt":
        # Between integers they become a part of what uses them.
        return "conversion" if any("f" in p for p in parts) else "free"
    if kind == "f64":
        return "double"
    if kind in ("f32", "f16", "bf16"):
        return "float"
    return "integer64" if kind in ("s64", "u64", "b64") else "integer"


def vector(parts: list[str]) -> int:
    return next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)


def size(kind: str) -> int:
    return int(kind[1:]) // 8


def identifier(name: str) -> str:
    return name.replace("$", "_")
