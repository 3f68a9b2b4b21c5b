"""Quality of span methods: what is asked for, tables and pictures of made-up results, runs that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtpass import passes
from trtpass.errors import InputError
from trtpass.quality.span import Plan, _done, grids, picture, settings


def results() -> dict[str, Any]:
    rows = []
    for method, kept, _ in settings(Plan(kept=(0.5, 0.25)), 30):
        for task, value in (("passkey", -0.5), ("text", -3.0)):
            means = [value + kept, value + kept * 2]
            row = {"method": method, "kept": kept, "task": task, "tokens": 1000, "held": kept}
            rows.append({**row, "means": means, "exact": [True, kept > 0.3]})
    return {"model": "tiny", "scored": 8, "results": rows}


def test_every_setting_is_a_pass() -> None:
    words = [text for _, _, text in settings(Plan(), 30) if text]
    assert len(words) == len(set(words)) == 18
    keeps = {passes.parse(text).options.permille for text in words if "layer=15" in text}
    assert keeps == {750, 500, 250}


def test_tables() -> None:
    passkey, text = grids(results())
    assert passkey.rows[0][2] == "2 of 2" and passkey.rows[-1][0] == "0.25" and passkey.rows[-1][2] == "1 of 2"
    # dense: -2 and -1; half kept: -2.5 and -2, so -0.5 and -1
    assert text.rows[1][:3] == ("0.5", " / ".join(["0.50"] * 6), "-0.750 ± 0.250")
    assert picture(results())[:4] == b"\x89PNG"


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    file, header = tmp_path / "x.json", {"model": "tiny", "scored": 8}
    assert _done(file, header) == []
    file.write_text(json.dumps(results()))
    assert len(_done(file, header)) == len(results()["results"])
    with pytest.raises(InputError, match="another measurement"):
        _done(file, {**header, "scored": 9})
    file.write_text("[]")
    with pytest.raises(InputError, match="not a result"):
        _done(file, header)
