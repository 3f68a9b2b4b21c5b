"""Prove an engine folder again: its files against the manifest, and the ladder on its own graphs."""

from __future__ import annotations

from pathlib import Path

from trtpass import io, passes
from trtpass.build import CARRIED, DENSE, Ladder, check_ladder, probe_for
from trtpass.errors import CheckFailed, InputError
from trtpass.manifest import Checks, Manifest, artifact
from trtpass.passes import Pass, all_methods
from trtpass.passes.kvzap import RECIPE_KEY
from trtpass.passes.paged_cache import PAGE
from trtpass.progress import Report, silent


def pipeline_of(manifest: Manifest, folder: Path) -> list[Pass]:
    """The passes of the engine in ``folder``, with the options that it was built with.

    Raises:
        InputError: the manifest names a pass or an option that this version does not have.
    """
    steps: list[Pass] = []
    for record in manifest.passes:
        method = all_methods().get(record.name)
        if method is None:
            raise InputError(
                f"the manifest names pass '{record.name}'", f"one of {', '.join(all_methods())}", "build again"
            )
        options = dict(record.options)
        if options.get("weights") == CARRIED:
            options["weights"] = str(folder / CARRIED)
        try:
            steps.append(method.described(options))
        except (InputError, TypeError) as error:
            words = error.found if isinstance(error, InputError) else str(error)
            raise InputError(
                f"the manifest's options of '{record.name}' do not fit: {words}", fix="build again"
            ) from error
    return steps


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise unless every artifact is there with its size and hash.

    Raises:
        InputError: an artifact's path leads outside the folder.
        CheckFailed: a file is missing or has changed since it was built.
    """
    for item in manifest.artifacts:
        path = folder / item.path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"the manifest names '{item.path}', outside the engine's folder")
        if not path.is_file():
            raise CheckFailed(f"'{item.path}' is missing", "a file of the manifest", "build again")
        now = artifact(folder, path)
        if now.sha256 != item.sha256:
            raise CheckFailed(f"'{item.path}' has changed since it was built", f"sha256 {item.sha256}", "build again")


def validate(folder: Path, model: str | None = None, report: Report = silent) -> Checks:
    """Run the ladder on a finished engine and record the outcome in its manifest.

    Args:
        folder: the engine's folder.
        model: where its torch model is (name, folder or ONNX file); None takes the name in the manifest.

    Raises:
        InputError: not an engine folder, or its model is not known any more.
        CheckFailed: a file has changed.
    """
    manifest = Manifest.read(folder)
    report("hashing", 0.05)
    verify_files(folder, manifest)
    steps = pipeline_of(manifest, folder)
    prove = _prove_encoder if manifest.kind == "encoder" else _prove_decoder
    manifest.checks = prove(folder, manifest, steps, model or manifest.origin, report)
    temporary = folder / ".manifest.json"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n")
    temporary.replace(folder / "manifest.json")
    return manifest.checks


def _prove_decoder(folder: Path, manifest: Manifest, steps: list[Pass], origin: str, report: Report) -> Checks:
    from graphs import resolve

    loaded = resolve(origin).load()
    dense = io.load(folder / DENSE)
    dense.metadata_props[RECIPE_KEY] = manifest.model
    rewritten = dense.clone()
    results = passes.run(rewritten, steps)
    probe = probe_for(loaded, dense, steps)
    page = manifest.page or PAGE
    ladder = Ladder(folder, dense, rewritten, steps, results, probe, loaded.module, loaded.onnx, page=page)
    return check_ladder(ladder, manifest.target, report, manifest.kernels, manifest.unbuilt)


def _prove_encoder(folder: Path, manifest: Manifest, steps: list[Pass], origin: str, report: Report) -> Checks:
    """With the inputs of the build, which are one of its artifacts."""
    from graphs import resolve
    from trtpass.encoder_checks import EncoderLadder
    from trtpass.encoder_inputs import stored_probe

    loaded = resolve(origin).load()
    dense = io.load(folder / DENSE)
    rewritten = dense.clone()
    results = passes.run(rewritten, steps)
    probe = stored_probe(folder / "inputs.json", dense)
    ladder = EncoderLadder(folder, dense, rewritten, steps, results, probe, loaded.module, loaded.onnx)
    return ladder.checks(manifest.target, report, manifest.kernels, manifest.unbuilt)
