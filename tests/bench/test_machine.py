import os

from dfs_cli.bench.machine import describe_machine


def test_the_machine_is_described() -> None:
    facts = describe_machine()
    assert facts["cores"] == str(os.cpu_count()) and facts["processor"] and facts["system"] and facts["torch"]
