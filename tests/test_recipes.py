"Recipes and what they share: their chapters run from top to bottom."
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(p for p in (REPO/'nbs/recipes').rglob('*.ipynb') if not any(x.startswith(('_', '.')) for x in p.relative_to(REPO/'nbs').parts))


@pytest.mark.slow
@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_the_chapter_runs(path):
    code = "import sys; from pathlib import Path; from nbdev.test import test_nb; sys.exit(not test_nb(Path(sys.argv[1]), basepath=Path(sys.argv[2]))[0])"
    done = subprocess.run([sys.executable, '-c', code, str(path), str(REPO)], cwd=REPO, env={**os.environ, 'LLAVA_MED_ROOT': str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_recipes(): assert CHAPTERS
