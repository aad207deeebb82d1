"""`thermocline predictor`: PowerInfer's predictor folders, in and out."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App

import thermocline
from thermocline.cli.convert import ForceFlag
from thermocline.cli.exchange import show_exchange
from thermocline.cli.flags import JsonFlag, ModelFlag, VerboseFlag, flag

HELP = """Bring a predictor in from PowerInfer's folder of PyTorch files, or write one for it.

For example:

  thermocline predictor import folder/ -m model.gguf -o model.predictor.safetensors

  thermocline predictor export model.predictor.safetensors -o folder/"""

predictor = App(name="predictor", help=HELP, help_format="plaintext", result_action="return_value")


@predictor.command(name="import")
def bring(
    folder: str,
    /,
    *,
    model: ModelFlag = None,
    output: Annotated[str, flag("--output", "-o", help="File to write, such as X.predictor.safetensors.")],
    force: ForceFlag = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Read model_0.pt, model_1.pt and so on of FOLDER, and its config.json, as the predictor of a model.

    Nothing in the files is executed.

    For example:

      thermocline predictor import folder/ -m model.gguf -o model.predictor.safetensors
    """
    source = thermocline.shipped_model() if model is None else model
    done = thermocline.import_predictor(source, folder, output, force=force)
    show_exchange(done, as_json=as_json, verbose=verbose)
    return 0


@predictor.command
def export(
    file: str,
    /,
    *,
    output: Annotated[str, flag("--output", "-o", help="New folder.")],
    predictor_threshold: Annotated[
        float | None,
        flag("--predictor-threshold", help="Use this threshold in all layers instead of their own.", hyphen=True),
    ] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Write FILE, a predictor or a model with one inside, as the folder that PowerInfer's converters take.

    PowerInfer has one threshold for all layers: scores are scaled so that the first layer's is that of all.

    For example:

      thermocline predictor export model.predictor.safetensors -o folder/
    """
    done = thermocline.export_predictor(file, output, threshold=predictor_threshold)
    show_exchange(done, as_json=as_json, verbose=verbose)
    return 0
