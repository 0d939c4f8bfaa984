"""`tessera info`: which kernels run here, and why not better ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tessera.codecs import Codec


def info() -> None:
    """List the kernels that run on this machine, and say why faster ones cannot.

    Example:

        tessera info

        TESSERA_BACKEND=cpu:avx2 tessera info
    """
    from rich.console import Console
    from rich.table import Table

    from tessera.cli.errors import one_line_errors
    from tessera.cli.quiet import quiet

    quiet()
    from tessera import codecs
    from tessera.evaluation.records import environment
    from tessera.kernels import cpu, operations, triton
    from tessera.kernels import dispatch as dispatch
    from tessera.tensor_cache import forms as forms  # the import registers its recurrence

    with one_line_errors():
        asked = operations.chosen(None)
    console = Console()
    found = [f"{name} {value}" for name, value in environment().items() if name not in ("date", "kernels")]
    console.print(", ".join(found), highlight=False)
    table = Table("backend", "runs", "why")
    best = cpu.levels()[-1] if cpu.levels() else None
    for level in reversed(cpu.LEVELS):
        here = level in cpu.levels()
        why = cpu.MISSING or ("the fastest here" if level == best else "" if here else "the processor lacks its instructions")
        table.add_row(f"cpu:{level}", "yes" if here else "no", why)
    table.add_row("triton", "no" if triton.missing() else "yes", triton.missing() or "for tensors on the GPU")
    table.add_row("reference", "yes", "plain PyTorch: the definition, and what no kernel can do")
    console.print(table)
    listed = Table("operation", "cpu", "triton", "runs here", title="What has kernels", title_justify="left")
    family = asked.partition(":")[0]
    for operation in operations.OPERATIONS.values():
        can = {one: operations.missing(one) is None for one in operation.implementations}
        cells = ["-" if one not in can else "yes" if can[one] else "not here" for one in operations.DEVICES]
        wanted = [one for one in can if can[one] and family in ("auto", one)]
        listed.add_row(f"{operation.name}: {operation.what}", *cells, " or ".join(wanted) or "reference")
    console.print(listed)
    console.print(
        "A kernel runs for tensors on its device that it can take (cpu: on the CPU, triton: on the GPU); the reference, plain "
        "PyTorch, runs for all others.",
        highlight=False,
    )
    unread = [spec for spec in codecs.examples() if not _read_on_a_gpu(codecs.get(spec))]
    console.print(
        "Attention over packed vectors has kernels for every codec on a CPU, and on a GPU for all but "
        f"{', '.join(unread)}, whose vectors are decoded in PyTorch there.",
        highlight=False,
    )
    console.print(
        f"In use: {asked}" + ("" if asked != "auto" else f" - cpu:{best}" if best else " - reference") + ". "
        f"TESSERA_BACKEND takes {', '.join(operations.BACKENDS)}.",
        highlight=False,
    )


def _read_on_a_gpu(codec: Codec) -> bool:
    """Whether there is a Triton kernel for a codec's keys and values."""
    from tessera.codecs import Role
    from tessera.kernels.triton.formats import readable

    roles: tuple[Role, ...] = ("key", "value")
    return all(readable(codec.side(role).kernel_format(128)) for role in roles)
