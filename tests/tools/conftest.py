import pytest


@pytest.fixture(scope="session")
def runs(run_program, tmp_path_factory):
    """Train the runs of convert_cases.py; return the folder that holds them."""
    out = tmp_path_factory.mktemp("convert")
    run_program("convert_cases.py", out)
    return out
