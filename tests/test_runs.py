"Whose a run is: two people may share a clone, and neither writes into the other's runs."
import os
from contextlib import contextmanager

import pytest

from llava_med.core.devices import user_of
from llava_med.core.runs import RunLock, RunLocked, update_run

needs_root = pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can play two users')
ADA, BEN = 47001, 47002


@contextmanager
def user(uid):
    "The same process as another user, whose new files everybody may write."
    mask, me = os.umask(0), os.geteuid()
    os.seteuid(uid)
    try: yield
    finally: os.seteuid(me); os.umask(mask)


def content(folder): return {p.name: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def shared(tmp_path, monkeypatch):
    "A folder of runs that everybody may write, as in a clone that a class shares."
    folder = tmp_path/'outputs'
    folder.mkdir()
    folder.chmod(0o777)
    for p in (tmp_path, *tmp_path.parents):
        if p.stat().st_mode & 0o001 == 0 and p.owner() == 'root' and str(p).startswith('/tmp/'): p.chmod(p.stat().st_mode | 0o011)
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(folder))
    return folder


@needs_root
def test_two_users_at_once_in_one_clone(shared):
    with user(ADA):
        update_run('one', preset='tiny')
        first = RunLock('one', 'tiny').__enter__()
    before = content(shared/'one')
    with user(BEN):
        with pytest.raises(RunLocked, match=f'belongs to the user {ADA}: choose another name.*LLAVA_MED_OUTPUTS'): RunLock('one', 'tiny').__enter__()
        with RunLock('two', 'tiny'): update_run('two', preset='tiny')
    with user(ADA): first.release()
    assert {p.name: p.stat().st_uid for p in shared.iterdir()} == {'one': ADA, 'two': BEN}
    before.pop('.owner.json')
    assert content(shared/'one') == before
    with user(BEN), pytest.raises(RunLocked, match='belongs to'): RunLock('one', 'tiny').__enter__()   # also when it has ended
    with user(ADA), RunLock('one', 'tiny'): pass
    with RunLock('one', 'tiny'): pass   # root, as in a container


@needs_root
def test_a_drive_that_does_not_tell_users_apart(shared, monkeypatch):
    with user(ADA): (shared/'one').mkdir()
    with user(BEN):
        assert user_of(shared/'one') == str(ADA)
        real = os.fstat
        monkeypatch.setattr(os, 'fstat', lambda fd: os.stat_result([*real(fd)[:4], ADA, *real(fd)[5:]]))
        assert user_of(shared/'one') == ''


def test_an_own_folder(tmp_path): assert user_of(tmp_path) == user_of(tmp_path/'new') == ''
