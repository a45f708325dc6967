"""`ctfm models`: the backbones, and what each costs with a head."""

from typing import TYPE_CHECKING, Annotated

import typer

from ctfm.cli.console import out, print_table
from ctfm.cli.options import TrustRemoteCode
from ctfm.heads.config import FitConfig

if TYPE_CHECKING:
    from ctfm.extract.backbone import BackboneEntry
    from ctfm.extract.backbones import Listed

models_app = typer.Typer(help="List the backbones, or show one.", invoke_without_command=True)


@models_app.callback()
def models(context: typer.Context) -> None:
    """List the backbones: what they need, and whether their weights are here."""
    if context.invoked_subcommand is not None:
        return
    from ctfm.extract.backbones import list_backbones

    listed = list_backbones()
    rows = [
        [
            one.entry.name,
            " ".join(f"{token}:{dim}" for token, dim in one.entry.tokens.items()),
            f"{one.entry.parameters / 1e6:.1f} M",
            f"{_molre(one.entry):,}",
            _access(one),
            one.weights,
        ]
        for one in listed
    ]
    molre = f"MoLRE, K={FitConfig.experts}"
    header = ["model", "token:d", "size", molre, "access", "weights"]
    print_table("backbones", header, rows)
    out.print(
        "and timm:<name>, hf:<repository>, openclip:<name>, or the path of a program (.pt2, .pt); "
        "--weights takes a local file or folder"
    )
    out.print(
        "gated: accept the licence on the model's page (https://huggingface.co/<hub id>), then "
        "`hf auth login`; `ctfm models show NAME` has the hub id and the licence"
    )


def _molre(entry: "BackboneEntry") -> int:
    """Numbers of a MoLRE as `ctfm fit-head` makes it, on the first token."""
    from ctfm.heads.molre import parameter_count

    return parameter_count(
        next(iter(entry.tokens.values())),
        FitConfig.experts,
        FitConfig.rank,
        router_hidden=FitConfig.router_hidden,
        expert_bias=FitConfig.expert_bias,
    )


def _access(listed: "Listed") -> str:
    if listed.weights == "not published":
        return "your own"
    return "gated" if listed.entry.gated else "open"


@models_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Backbone, as `ctfm models` lists it.")],
    experts: Annotated[int, typer.Option(min=0, help="K.")] = FitConfig.experts,
    rank: Annotated[int, typer.Option(min=1, help="Of the experts and of LoRA.")] = FitConfig.rank,
    router_hidden: Annotated[
        int, typer.Option(min=1, help="Hidden width of the router.")
    ] = FitConfig.router_hidden,
    findings: Annotated[int, typer.Option(min=1, help="Of the classifier.")] = 75,
    lora: Annotated[bool, typer.Option(help="Count LoRA as the paper's Table 2 does.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the facts of a backbone with their sources, and count its parameters with a head."""
    from ctfm.extract.backbone import FACTS
    from ctfm.extract.backbones import BACKBONES, get_entry
    from ctfm.extract.parameters import count_parameters
    from ctfm.heads.molre import parameter_count

    foreign = name not in BACKBONES  # nothing is known of it before its config is here
    entry = get_entry(name, trust_remote_code=trust_remote_code, download=foreign)
    facts = [
        [fact, str(getattr(entry, fact)), entry.sources[fact]]
        for fact in FACTS
        if fact in entry.sources
    ]
    print_table(name, ["fact", "value", "stated in"], facts)
    if entry.skeleton is None:
        why = (
            "its shape is known only from a checkpoint" if entry.parameters else "it has no weights"
        )
        out.print(f"{why}, so its parameters are not counted")
        return
    counted = count_parameters(entry, rank=rank)
    dim = next(iter(entry.tokens.values()))
    parts = {
        "backbone": counted.backbone,
        "LoRA, attention": counted.lora_attention if lora else 0,
        "LoRA, patch embedding": counted.lora_patches if lora else 0,
        "query": dim,
        f"classifier, {findings} findings": findings * (dim + 1),
        f"MoLRE, K={experts}": parameter_count(dim, experts, rank, router_hidden=router_hidden),
    }
    total = sum(parts.values())
    rows = [[part, f"{count:,}", f"{count / 1e6:.2f} M"] for part, count in parts.items() if count]
    rows.append(["total", f"{total:,}", f"{total / 1e6:.1f} M"])
    trained = total - counted.backbone
    rows.append(["of it trained", f"{trained:,}", f"{trained / 1e6:.2f} M"])
    print_table("parameters", ["part", "count", ""], rows)
