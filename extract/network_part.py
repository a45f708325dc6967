"""The part of a checkpoint that is one network: all names of a file, to the network's own names.

Training code keeps a network inside other things, and each of them leaves its mark in the names:

    before    keys of what was saved (`state_dict`, `model_ema`), attributes of the module that held
              it (`backbone.`, `model.`), wrappers (`module.` of DataParallel, of an averaged model
              and of DeepSpeed)
    between   `_orig_mod.` of torch.compile, `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`
    beside    a classifier, a loss, counters

One name that the network has once, its mark, tells where it is. If it is there once, what stands
before it is cut off; what lies beside it may be a head and nothing else. If it is there more than
once (`model` and `model_ema`, `student` and `teacher`), only a key can say which is meant.

Sources: torch 2.15, torch/optim/swa_utils.py and
torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py; peft 0.21, lora/layer.py;
pytorch-lightning 2.6.6, the checkpoint connector.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ctfm.store.errors import BackboneError, ChoiceError, some

TOP = "."
"""The key of what is below no other key."""

_BETWEEN = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_KNOWN_BEFORE = re.compile(
    r"(?:state_dict|model_state_dict|model|module|net|network|backbone|encoder|_forward_module)\."
)
_HEAD = re.compile(
    r"(?:\w+_)?(?:heads?|classifiers?|criterion|criteria|loss|losses|metrics?)(?:_?\d+)?\."
    r"|(?:fc|linear|logits|probe|score|class_layers|out|projector|loss_fn|loss_func)\d*\."
    r"|(?:train|val|valid|test)_\w*(?:acc|auc|auroc|f1)\w*\."
    r"|(?:pos_weight|class_weights?)$"
    r"|(?:n_averaged|num_updates|decay|initted|step|epoch|global_step|iteration)$"
)
"""Start of a name that is behind the network, and of what training counts."""
_UNMERGED = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|base_layer|hada_w1_a|ia3_l)\b")
_STATE = re.compile(
    r"(?:(?:checkpoint|ckpt|state)\.)?(?:"
    r"(?:callbacks?|hyper_?parameters|hparams|loops?|config|args|cfg|trainer\w*|dataloader\w*"
    r"|optim\w*|\w+_optimizers?|(?:lr_)?schedulers?\w*|grad_scaler\w*|scaler\w*|amp|sampler\w*"
    r"|\w*rng_states?|\w*random_states?|meters?|history|best_\w+|epochs?|steps?|global_step\w*)(?:\.|$)"
    r"|(?:\w*(?:loss(?:es)?|scores?|accuracy|auc|auroc)\w*(?:\.\d+)?|(?:\w+_)?lr|\w+_history)$"
    r"|loss_history\.)"
    r"|(?:.*\.)?(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)(?:\.|$)"
)
"""Start of a name of what training keeps of itself: of callbacks, settings, an optimizer."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What tells a network from what is around it."""

    mark: re.Pattern[str]
    """Matches, whole, the name of one tensor that the network has once, whatever the layout."""

    belongs: re.Pattern[str] | None = None
    """Of a tower of a larger model: matches the start of its names, and is cut off; nothing else is
    looked at. None: everything but a head must belong to the network."""

    own: Collection[str] = ()
    """Names of the network that a head might have too."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where the tensors of a network are in a checkpoint."""

    names: Mapping[str, str]
    """The network's own name of each to that of the file."""

    remarks: tuple[str, ...]
    """What was cut off, left out or chosen, for the user."""


def find_part(
    names: Collection[str],
    signature: Signature,
    key: str | None,
    *,
    scalars: Collection[str] = (),
) -> Part:
    """Find a network among the names of a checkpoint.

    Args:
        names: Of all tensors; those in mappings below each other joined by dots.
        signature: Of the network.
        key: Start of the names that are meant, up to a dot; `TOP` is what lies under no key that
            could be meant. None: the network is there once.
        scalars: Those of the names whose tensors are single numbers, as far as that is known.

    Raises:
        ChoiceError: If it is there more than once, or beside what is no head.
        BackboneError: If nothing has this key, or LoRA pairs were not merged.
    """
    state = {n for n in names if _is_state(n, signature, scalars=scalars)}
    clean = _clean(n for n in names if n not in state)
    chosen = clean if key is None else _below(clean, key, signature)
    _refuse_unmerged(chosen)
    outer = _outer(chosen, signature, given=key)
    inside = {
        name.removeprefix(outer): raw for name, raw in chosen.items() if name.startswith(outer)
    }
    beside = {name for name in chosen if not name.startswith(outer)}
    if signature.belongs is None:
        _refuse_others(beside, outer, given=key)
        heads = {own for own in inside if _HEAD.match(own) and own not in signature.own}
        own_names = {own: raw for own, raw in inside.items() if own not in heads}
    else:
        heads = {own for own in inside if _HEAD.match(own) and not signature.belongs.match(own)}
        own_names = _tower(inside, signature.belongs)
        beside = {name for name in beside if _HEAD.match(_relative(name, outer))}
    left_out = sorted({outer + own for own in heads} | beside)
    remarks = _remarks(clean.values(), outer, left_out=left_out, key=key)
    of_training = sorted({name.partition(".")[0] for name in state})
    more = (f"left out, of the training: {some(of_training)}",) if state else ()
    return Part(names=own_names, remarks=(*remarks, *more))


def _is_state(name: str, signature: Signature, *, scalars: Collection[str]) -> bool:
    """Whether a tensor is what a training keeps of itself, wherever the network is."""
    if name in signature.own:
        return False
    return _STATE.match(name) is not None or (name in scalars and "." not in name)


def _clean(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers put between their parts, to those of the file."""
    clean: dict[str, str] = {}
    for raw in names:
        name = _BETWEEN.sub("", raw)
        if name in clean:
            raise BackboneError(
                f"the checkpoint holds {name} with and without a wrapper's name ({clean[name]}, "
                f"{raw}): save the network alone"
            )
        clean[name] = raw
    return clean


def _below(clean: Mapping[str, str], key: str, signature: Signature) -> dict[str, str]:
    if key == TOP:
        others = [outer for outer in _outers(clean, signature) if outer]
        return {n: raw for n, raw in clean.items() if not n.startswith(tuple(others))}
    start = _BETWEEN.sub("", f"{key.rstrip('.')}.")
    below = {n.removeprefix(start): raw for n, raw in clean.items() if n.startswith(start)}
    if not below:
        tops = sorted({name.partition(".")[0] for name in clean})
        raise BackboneError(
            f"the checkpoint holds no tensors under {key!r} (--weights-key): at its top are "
            f"{some(tops)}"
        )
    return below


def _refuse_unmerged(names: Iterable[str]) -> None:
    if pairs := [name for name in names if _UNMERGED.search(name)]:
        raise BackboneError(
            f"the checkpoint holds an adapter that is not merged ({some(pairs)}): merge it where "
            "it was trained (PEFT: merge_and_unload) and save that, or pass its folder (PEFT: "
            "save_pretrained) with --adapter, and the weights it was trained on with --weights"
        )


def _outers(clean: Iterable[str], signature: Signature) -> set[str]:
    """Everything that stands before the mark, once for each time that it is there."""
    belongs = "" if signature.belongs is None else f"(?:{signature.belongs.pattern})"
    found = re.compile(rf"((?:[^.]+\.)*?){belongs}(?:{signature.mark.pattern})")
    return {match[1] for name in clean if (match := found.fullmatch(name))}


def _outer(clean: Mapping[str, str], signature: Signature, *, given: str | None) -> str:
    outers = _outers(clean, signature)
    if len(outers) > 1:
        keys = [_joined(given, _shortest(outer, outers)) for outer in sorted(outers)]
        raise ChoiceError(
            f"the checkpoint holds this network {len(outers)} times, under {some(keys)}: choose "
            f"one with --weights-key, such as --weights-key {keys[0]}",
            keys,
        )
    return outers.pop() if outers else _common_start(clean)


def _shortest(outer: str, outers: Collection[str]) -> str:
    """As few parts of a name as tell it from the others."""
    parts = outer.rstrip(".").split(".") if outer else []
    for count in range(1, len(parts) + 1):
        start = ".".join(parts[:count])
        if not any(f"{other}.".startswith(f"{start}.") for other in outers if other != outer):
            return start
    return TOP if not outer else outer.rstrip(".")


def _joined(given: str | None, key: str) -> str:
    return key if given in (None, TOP) else f"{given}.{key}"


def _common_start(clean: Iterable[str]) -> str:
    """What training code is known to put before all names, where the mark is not there."""
    names, start = list(clean), ""
    while match := _KNOWN_BEFORE.match(names[0], len(start)) if names else None:
        longer = start + match[0]
        if not all(name.startswith(longer) for name in names):
            break
        start = longer
    return start


def _refuse_others(beside: Iterable[str], outer: str, *, given: str | None) -> None:
    others = sorted(name for name in beside if not _is_behind(name, outer))
    if others:
        key = _joined(given, outer.rstrip("."))
        raise ChoiceError(
            f"the checkpoint holds the network under {key!r} and beside it {len(others)} tensors "
            f"that are no head ({some(others)}), which its input may have gone through: if it is "
            f"meant alone, pass --weights-key {key}",
            [key],
        )


def _is_behind(name: str, outer: str) -> bool:
    """Whether a tensor beside the network belongs to what its outputs go into."""
    relative = _relative(name, outer)
    if _HEAD.match(relative):
        return True
    own = outer.removesuffix(".").rpartition(".")[2]
    other = relative.partition(".")[0]
    return own.isdecimal() and other.isdecimal() and int(other) > int(own)  # of a Sequential


def _relative(name: str, outer: str) -> str:
    """A name below the deepest place that it shares with the network."""
    for part in outer.split("."):
        if not part or not name.startswith(f"{part}."):
            break
        name = name.removeprefix(f"{part}.")
    return name


def _tower(inside: Mapping[str, str], belongs: re.Pattern[str]) -> dict[str, str]:
    tower: dict[str, str] = {}
    for name, raw in inside.items():
        if (match := belongs.match(name)) is None:
            continue
        own = name[match.end() :]
        if own in tower:
            raise BackboneError(
                f"the checkpoint holds the tower's {own} twice ({tower[own]}, {raw}): save the "
                "tower alone"
            )
        tower[own] = raw
    return tower


def _remarks(
    names: Iterable[str], outer: str, *, left_out: Collection[str], key: str | None
) -> tuple[str, ...]:
    between = sorted({match[0] for name in names for match in _BETWEEN.finditer(name)})
    said = {
        f"taken: {key}": key is not None,
        f"cut off the names: {outer}": bool(outer),
        f"cut out of the names: {', '.join(between)}": bool(between),
        f"left out: {some(left_out)}": bool(left_out),
    }
    return tuple(remark for remark, holds in said.items() if holds)


def likely_cause(*, missing: Collection[str], expected: int, misshapen: int) -> str:
    """What may have happened to a checkpoint that does not fit, and what to do, for a message."""
    if misshapen and not missing:
        return "It is of another size of the network: give the checkpoint of this very backbone"
    if missing and len(missing) == expected:
        return (
            "No tensor has a name of this backbone: it is of another network, or of this one as "
            "another library names it"
        )
    return "Give the checkpoint of this very backbone"
