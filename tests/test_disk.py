"A full disk is one sentence, whoever meets it."
import errno
import os
import subprocess
import sys

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from llava_med.core.runs import OutputError, writing
from llava_med.models.llava import load, save, tiny_model


class SafetensorError(Exception): pass


@pytest.mark.parametrize('error', [SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)'), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                                   CheckpointException('save', {0: (OSError(errno.ENOSPC, 'No space left on device'), None)}), RuntimeError('[enforce fail] PytorchStreamWriter failed writing file data/0'),
                                   SafetensorError('I/O error: Disk quota exceeded (os error 122)')])
def test_errors_of_libraries_become_one_sentence(error):
    with pytest.raises(OutputError, match='Cannot write here.*free some space') as e:
        with writing('here'): raise error
    assert '\n' not in str(e.value) and e.value.__cause__ is error


@pytest.mark.parametrize('error', [SafetensorError('No such file (os error 2)'), ValueError('28'), RuntimeError('shape'), KeyboardInterrupt(), OSError(errno.ENOENT, 'gone')])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as e:
        with writing('here'): raise error
    assert e.value is error and not isinstance(e.value, OutputError)


def test_a_model_that_meets_a_full_disk(tmp_path):
    model, processor = tiny_model()
    save(model, processor, tmp_path/'m')
    code = ("import resource, signal, sys\nfrom llava_med.models.llava import save, tiny_model\nfrom llava_med.core.runs import OutputError\n"
            "m, p = tiny_model(seed=3)\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            f"try: save(m, p, {str(tmp_path/'m')!r})\nexcept OutputError as e: print('SAID', e)\n")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'SAID Cannot write' in out.stdout and 'free some space' in out.stdout, out.stderr[-800:]
    assert load(tmp_path/'m') and sorted(p.name for p in tmp_path.iterdir()) == ['m']
