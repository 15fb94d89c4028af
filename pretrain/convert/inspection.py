"""What a checkpoint holds, for people or as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from braid.data_pipeline.tokenizers import load_tokenizer
from braid.pretrain.checkpoint.folder import CheckpointReader, open_checkpoint, refusal, verify_folder
from braid.pretrain.checkpoint.snapshot import CONFIG_FILE, TOKENIZER_FOLDER, find_checkpoint
from braid.pretrain.checkpoint.store import format_bytes
from braid.pretrain.config.load import load_config

PLAN = ("engine", "tensor", "sequence", "context", "pipeline")


def show(path: Path, *, tensors: bool, as_json: bool) -> None:
    """Print what the checkpoint at `path` holds. Raises CheckpointError: there is none; or, after printing what can be
    said, it is damaged."""
    path = find_checkpoint(path, damaged=True)
    problem = verify_folder(path)
    with open_checkpoint(path, check_tensors=False) as reader:
        facts = describe(reader, problem)
        if tensors:
            facts["tensors"] = {
                group: {name: entry.to_json() for name, entry in entries.items()}
                for group, entries in reader.index.items()
            }
    print(json.dumps(facts, indent=1) if as_json else "\n".join(_lines(facts)))
    if problem is not None:
        raise refusal(path, problem)


def describe(reader: CheckpointReader, problem: str | None) -> dict[str, Any]:
    """Everything but the single tensors. Keys are stable: scripts read them."""
    config, state = load_config(reader.path / CONFIG_FILE), reader.state
    tokenizer = load_tokenizer(reader.path / TOKENIZER_FOLDER)
    groups = {
        group: {
            "tensors": len(entries),
            "values": sum(math.prod(entry.shape) for entry in entries.values()),
            "bytes": sum(entry.num_bytes for entry in entries.values()),
            "dtypes": sorted({entry.dtype for entry in entries.values()}),
            "files": len({piece.file for entry in entries.values() for piece in entry.pieces}),
        }
        for group, entries in reader.index.items()
    }
    files = reader.manifest["files"]
    return {
        "path": str(reader.path),
        "valid": problem is None,
        "problem": problem,
        "format": reader.manifest["format"],
        "step": reader.step,
        "steps": config.training.steps,
        "objective": state["objective"],
        "seed": state["seed"],
        "tokenizer": {"entries": tokenizer.vocab_size, "hash": tokenizer.hash},
        "encoder_fingerprint": state["encoder_fingerprint"],
        "noise_contract": state["noise_contract"],
        "versions": state["versions"],
        "written_by": {"processes": state["processes"]} | {name: getattr(config.parallel, name) for name in PLAN},
        "groups": groups,
        "files": len(files) + 1,
        "bytes": sum(entry["size"] for entry in files.values()),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    written = facts["written_by"]
    plan = ", ".join(f"{name} {written[name]}" for name in PLAN if written[name] not in (1, False))
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    verdict = "valid, every hash re-computed" if facts["valid"] else f"DAMAGED: {facts['problem']}"
    lines = [
        facts["path"],
        f"  manifest        {verdict}",
        f"  step            {facts['step']:,} of {facts['steps']:,}",
        f"  objective       {facts['objective']}",
        f"  seed            {facts['seed']}, noise contract {facts['noise_contract']}",
        f"  tokenizer       {facts['tokenizer']['entries']:,} entries, {facts['tokenizer']['hash'][:16]}",
        f"  encoder         {(facts['encoder_fingerprint'] or 'none')[:16]}",
        f"  written by      {written['processes']} processes ({plan}); {versions}",
        f"  size            {format_bytes(facts['bytes'])} in {facts['files']} files, format {facts['format']}",
        "",
        f"  {'group':14} {'tensors':>8} {'values':>16} {'size':>12} {'files':>6}  types",
    ]
    for name, group in facts["groups"].items():
        lines.append(
            f"  {name:14} {group['tensors']:8,} {group['values']:16,} {format_bytes(group['bytes']):>12} "
            f"{group['files']:6,}  {', '.join(group['dtypes'])}"
        )
    for group, entries in facts.get("tensors", {}).items():
        lines += ["", f"  {group}"]
        for name, entry in entries.items():
            pieces = f"  in {len(entry['pieces'])} pieces" if len(entry["pieces"]) > 1 else ""
            lines.append(f"    {entry['dtype']:5} {' x '.join(map(str, entry['shape'])) or '-':20} {name}{pieces}")
    return lines
