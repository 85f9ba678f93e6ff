"""What every Triton kernel compiles to on every chip: registers, spills, memory, instructions.

It needs no GPU. `--check` writes nothing and fails where a kernel spills, does not fit the chip or
misses its matrix instructions.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common.environment import RESULTS, write_result

# Chips of sm_80, 90, 100 and 120, with the most shared memory of a program, in bytes.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
# What a bfloat16 product must become there.
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
_SHAPE = ("row_stride", "out_stride", "vocab", "hidden_size", "token_stride", "vocab_stride")
_COMMON = {
    "targets": "*i64",
    "scale": "fp32",
    "softcap": "fp32",
    "inv_temperature": "fp32",
    "second_inv_temperature": "fp32",
}
# Arguments that a variant leaves out.
_NO_MAP = ("bias", "softcap")
_NO_SECOND = ("second_inv_temperature", "second_log_sums", "by_second")
_PLAIN = (*_NO_MAP, *_NO_SECOND, "by_lse", "by_entropy", "partial")


@dataclass(frozen=True)
class Case:
    """One kernel as launched on one chip.

    left_out: optional arguments that are None. ragged: no size or address is aligned.
    """

    kernel: str
    chip: int
    variant: str
    dtype: str
    options: dict[str, int]
    constants: dict[str, Any]
    left_out: tuple[str, ...] = ()
    types: dict[str, str] = field(default_factory=dict)
    multiplies: bool = False
    ragged: bool = False


def add_command(commands: Any) -> None:
    """Add `compiled` to the benchmark's commands."""
    parser = commands.add_parser("compiled", help=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--chips", nargs="+", type=int, default=list(SHARED_LIMIT))
    parser.add_argument("--check", action="store_true", help="write no result")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Compile everything, print a table and write it as JSON; fails where a gate does."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    import triton

    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    rows = []
    print(
        f"{'kernel':18} {'chip':>4} {'dtype':5} {'variant':15} registers stack shared instruction"
    )
    for chip in arguments.chips:
        for case in cases(chip):
            row = compile_case(case)
            rows.append(row)
            print(
                f"{row['kernel']:18} {chip:4} {row['dtype']:5} {row['variant']:15} "
                f"{row['registers']:9} {row['stack']:5} {row['shared']:6} {row['instruction']}",
                flush=True,
            )
    known = _SPILLS_OF_3_6 if triton.__version__ == "3.6.0" else {}
    failures = [failure for row in rows if (failure := failure_of(row, known))]
    if not arguments.check:
        path = RESULTS / "compiled" / f"triton-{triton.__version__}.json"
        write_result(path, {"triton": triton.__version__, "kernels": rows})
        print(f"result: {path}")
    if failures:
        raise SystemExit("\n".join(failures))
    besides = f" but for {', '.join(known)}" if known else ""
    print(f"{len(rows)} kernels compiled; none spills{besides}")


# Bytes of stack, with every option on; what later versions compile spills nothing.
_SPILLS_OF_3_6 = {
    "fused_combine fp32 all on sm_80": 8,
    "fused_partials bf16 all, tma, split on sm_90": 24,
}


def failure_of(row: dict[str, Any], known: Mapping[str, int] | None = None) -> str | None:
    """What is wrong with a compiled kernel, or None; known: spills that are put up with, bytes."""
    name = f"{row['kernel']} {row['dtype']} {row['variant']} on sm_{row['chip']}"
    if row["stack"] > (known or {}).get(name, 0) or row["local"]:
        return f"{name} spills: {row['stack']} bytes of stack, {row['local']} of local memory"
    if row["shared"] > SHARED_LIMIT[row["chip"]]:
        return f"{name} needs {row['shared']} bytes of shared memory"
    if row["multiplies"] and row["instruction"] != MATRIX_INSTRUCTION[row["chip"]]:
        return f"{name} has no {MATRIX_INSTRUCTION[row['chip']]}"
    return None


def cases(chip: int) -> Iterator[Case]:
    """Every kernel with the launch this chip gets, plain and with everything on."""
    from aepo_kernels.gpu import launch
    from aepo_kernels.gpu.launch import nearest

    more = "SQUARES", "LOGIT_STATS"
    per_token = {"PER_TOKEN": True, "SECOND_PER_TOKEN": True} | dict.fromkeys(more, True)
    scalar = {"PER_TOKEN": False, "SECOND_PER_TOKEN": False} | dict.fromkeys(more, False)
    pointers = {"inv_temperature": "*fp32", "second_inv_temperature": "*fp32"}
    for dtype in ("bf16", "fp32"):
        stats, grad = nearest(launch.STATS_LAUNCH, chip), nearest(launch.GRAD_LAUNCH, chip)
        vector = 8 if dtype == "bf16" else 4
        block = {"BLOCK": stats.block, "VECTOR": vector, "STAGES": stats.stages}
        warps = {"num_warps": stats.num_warps}
        plain = (*_NO_MAP, *_NO_SECOND)
        yield Case("row_stats", chip, "plain", dtype, warps, scalar | block, plain)
        yield Case("row_stats", chip, "second", dtype, warps, scalar | block, _NO_MAP)
        everything = {"constants": per_token | block, "types": pointers}
        yield Case("row_stats", chip, "all", dtype, warps, **everything)
        yield Case("row_stats", chip, "all, ragged", dtype, warps, **everything, ragged=True)
        block, warps = {"BLOCK": grad.block, "ROWS": 1}, {"num_warps": grad.num_warps}
        entropy = tuple(name for name in _PLAIN if name != "by_entropy")
        yield Case("row_grad", chip, "logprob", dtype, warps, scalar | block, _PLAIN)
        yield Case("row_grad", chip, "entropy", dtype, warps, scalar | block, entropy)
        block["ROWS"] = 64
        everything = {"constants": per_token | block, "types": pointers}
        yield Case("row_grad", chip, "all", dtype, warps, **everything)
        yield Case("row_grad", chip, "all, ragged", dtype, warps, **everything, ragged=True)
        tables = [launch.FUSED_LOGIT_STATS_LAUNCH, launch.FUSED_POINTER_LAUNCH, launch.FUSED_LAUNCH]
        if dtype == "fp32":
            tables = [launch.FUSED_FLOAT32_LAUNCH]
        tiles = dict.fromkeys(nearest(table, chip) for table in tables)
        for number, fused in enumerate(tiles):
            # The third one, of its own on some chips, never gives statistics of the logits.
            options = per_token | {"LOGIT_STATS": number < 2}
            yield from _fused_cases(chip, dtype, fused, scalar, options, pointers)
        types = {"values": f"*{dtype}", "size": "i64"}
        for variant, other in (("in place", dtype), ("rounded", "bf16")):
            block = {"BLOCK": 2048, "IN_PLACE": variant == "in place"}
            outs = types | {"out": f"*{other}"}
            yield Case("scale", chip, variant, dtype, {"num_warps": 4}, block, types=outs)
    combine = {"ROWS": 32, "TILES": 32}
    warps = {"num_warps": 4}
    yield Case("fused_combine", chip, "plain", "fp32", warps, scalar | combine, _NO_SECOND)
    yield Case("fused_combine", chip, "all", "fp32", warps, per_token | combine, types=pointers)


def _fused_cases(
    chip: int, dtype: str, fused: Any, scalar: dict, per_token: dict, pointers: dict
) -> Iterator[Case]:
    tile = {
        "BLOCK_TOKENS": fused.block_tokens,
        "BLOCK_VOCAB": fused.block_vocab,
        "BLOCK_HIDDEN": fused.block_hidden,
        "GROUP": fused.group,
        "SPLIT": fused.split,
        "TMA": fused.tma,
        "hidden_stride": 1,
        "weight_stride": 1,
    }
    options = {"num_warps": fused.num_warps, "num_stages": fused.stages}
    types = {}
    if fused.tma:
        shapes = {"hidden": fused.block_tokens, "weight": fused.block_vocab}
        types = {
            name: f"tensordesc<{dtype}[{rows}, {fused.block_hidden}]>"
            for name, rows in shapes.items()
        }
    for variant, constants, left_out, extra in (
        ("plain", scalar, (*_NO_MAP, *_NO_SECOND), {}),
        ("all", per_token, (), pointers),
        ("all, ragged", per_token, (), pointers),
    ):
        ragged = "ragged" in variant
        if fused.tma and ragged:
            continue  # the copy engine takes aligned rows alone
        yield Case(
            "fused_partials",
            chip,
            variant + ", tma" * fused.tma + ", split" * fused.split,
            dtype,
            options,
            constants | tile,
            left_out,
            types | extra,
            multiplies=dtype == "bf16",
            ragged=ragged,
        )


def compile_case(case: Case) -> dict[str, Any]:
    """Compile one kernel and read what it needs from the binary."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(case.kernel)
    names = kernel.arg_names
    wanted = dict.fromkeys(case.left_out) | case.constants
    constants = {name: value for name, value in wanted.items() if name in names}
    signature = {n: "constexpr" if n in constants else _type(n, case) for n in names}
    aligned = (
        [] if case.ragged else [n for n in names if signature[n].startswith("*") or n in _SHAPE]
    )
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target = GPUTarget("cuda", case.chip, 32)
    compiled = triton.compile(source, target=target, options=case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    ptx = compiled.asm["ptx"]
    known = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx]
    return {
        "kernel": case.kernel,
        "chip": case.chip,
        "variant": case.variant,
        "dtype": case.dtype,
        **case.options,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "shared": compiled.metadata.shared,
        "instruction": known[0] if known else "-",
        "multiplies": case.multiplies,
    }


def _kernel(name: str) -> Any:
    from aepo_kernels.gpu import fused as triton_fused
    from aepo_kernels.gpu import rows as triton_rows
    from aepo_kernels.gpu import scale as triton_scale

    return {
        "row_stats": triton_rows.stats_kernel,
        "row_grad": triton_rows.grad_kernel,
        "fused_partials": triton_fused.partials_kernel,
        "fused_combine": triton_fused.combine_kernel,
        "scale": triton_scale.scale_kernel,
    }[name]


def _type(name: str, case: Case) -> str:
    """Triton's type of an argument; integers are 32 bits, anything not named is float32 memory."""
    if name in case.types:
        return case.types[name]
    if name in _COMMON:
        return _COMMON[name]
    if name in ("num_rows", "num_tiles", "stride") or name in _SHAPE:
        return "i32"
    in_dtype = ("raw_logits", "hidden", "weight") + (("out",) if case.kernel == "row_grad" else ())
    return f"*{case.dtype}" if name in in_dtype else "*fp32"
