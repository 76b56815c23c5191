"""The script that changes the package names modules and tests that there are."""

from conftest import ROOT
from mutate import TESTS


def test_mutated_modules_and_their_tests_exist():
    for module, files in TESTS.items():
        assert (ROOT / f"phi3_mlx/{module}.py").is_file(), module
        assert all((ROOT / f"tests/{file}.py").is_file() for file in files), module
