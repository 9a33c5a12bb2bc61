"""What several files of integration tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.report_runs import FOLDER, hostile_data, trained


@pytest.fixture(scope="session")
def hostile_run(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, evaluated, with rejected images; moved to a folder of a hostile name afterwards."""
    place = tmp_path_factory.mktemp("hostile")
    made = trained(place / "run", hostile_data(place / "data"))
    return Path(shutil.move(made, place / FOLDER))
