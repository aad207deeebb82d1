"""`thermocline report`: draw which neurons fire."""

from __future__ import annotations

from typing import Annotated

import thermocline
from thermocline.cli.flags import JsonFlag, flag
from thermocline.cli.output import status, write_json
from thermocline.errors import UsageError


def report(
    file: str,
    /,
    *,
    output: Annotated[str | None, flag("--output", "-o", help="Page to write, such as report.html.")] = None,
    predictor: Annotated[
        str | None,
        flag("--predictor", help="Predictor whose quality to draw as well; without, the one beside FILE, if any."),
    ] = None,
    plan: Annotated[str | None, flag("--plan", help="Plan to draw over the heat map.")] = None,
    pictures: Annotated[str | None, flag("--pictures", help="Folder to write the single pictures to, as SVG.")] = None,
    as_json: JsonFlag = False,
) -> int:
    """Draw an activity as one self-contained page.

    For example:

      thermocline report model.activity.safetensors -o report.html

      thermocline report model.activity.safetensors -o report.html --predictor other.predictor.safetensors

      thermocline report model.activity.safetensors -o report.html --plan plan.json

      thermocline report model.activity.safetensors --pictures docs/pictures
    """
    if output is None and pictures is None:
        raise UsageError("there is nothing to write; give -o PAGE.html, --pictures FOLDER, or both")
    written = thermocline.report(
        file,
        output,
        predictor=predictor,
        pictures=pictures,
        plan=plan,
        notice=lambda line: status(f"note: {line}", always=True),
    )
    if as_json:
        write_json({"written": [str(path) for path in written]})
    else:
        for path in written:
            print(path)
    return 0
