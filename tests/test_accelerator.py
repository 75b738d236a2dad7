import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

pytestmark = pytest.mark.medium


@pytest.mark.medium
@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made of Python",
)
@pytest.mark.slow
def test_networks_run_on_another_device_and_seldom_wait_for_it(artifact: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(artifact, tmp_path))
    program = Path(__file__).with_name("on_accelerator.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for gate, most in (("rnn", 5), ("ff", 5), ("probe", 3), ("static", 1)):
        for kind in ("batch", "image", "mixed"):
            assert 0 < found[gate][kind] <= most, f"{kind} with {gate}: a network of five blocks"
    assert found["file"]["mixed_is_lower"] and found["file"]["mixed_top1"] > found["file"]["top1"] - 2
