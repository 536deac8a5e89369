"One opener for all JSON, and for the text and the pointers that people's files turn out to be."
import json

import pytest

from llava_med.core import json_stream
from llava_med.core.json_stream import json_values
from llava_med.core.runs import LFS_POINTER, parse_json, read_json, read_jsonl, read_text
from llava_med.data.articles import read_articles
from llava_med.data.filters import HeldOut
from llava_med.data.images import ImageError, Package, PackageError, open_image
from llava_med.data.llava_files import training_records
from llava_med.data.vqa_files import plain_pickle
from llava_med.data.vqa_readers import read_vqa
from llava_med.evaluate.answer_files import read_answers
from llava_med.evaluate.exact import ScoreError

POINTER = LFS_POINTER + b'.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n'
ITEM = dict(id='a', images=['a.png'], question='Größe?', answer='no', answer_type='CLOSED', options=[], tags={}, split='test', regions=[], twin_of=None, source='mine')
ANSWER = dict(id='a', prompt='Größe?', text='no')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_every_unicode_encoding_is_read_by_every_reader(tmp_path, encoding):
    def written(name, text):
        (tmp_path/name).write_bytes(text.encode(encoding))
        return tmp_path/name
    assert read_vqa(written('test.json', json.dumps([ITEM], ensure_ascii=False)), part=True)[0]['question'] == 'Größe?'
    assert read_vqa(written('test.jsonl', json.dumps(ITEM, ensure_ascii=False)), part=True)[0]['question'] == 'Größe?'
    assert read_vqa(written('test.csv', 'image,question,answer\na.png,Größe?,no\n'), part=True)[0]['question'] == 'Größe?'
    for name, text in (('a.json', json.dumps([ANSWER], ensure_ascii=False)), ('a.jsonl', json.dumps(ANSWER, ensure_ascii=False)), ('a.csv', 'id,prompt,text\na,Größe?,no\n')):
        assert read_answers(written(name, text))[0]['prompt'] == 'Größe?'
    assert read_json(written('x.json', '{"a": "ß"}')) == {'a': 'ß'} and read_jsonl(written('x.jsonl', '{"a": "ß"}\n')) == [{'a': 'ß'}]


@pytest.mark.parametrize('name, layout', [('t.json', '[{}]'), ('t.jsonl', '{}\n')])
def test_an_id_of_21_digits_and_a_nan_are_read_in_both_layouts(tmp_path, name, layout):
    record = '{"id": 123456789012345678901, "image": "p.png", "note": NaN, "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "It."}]}'
    (tmp_path/name).write_text(layout.replace('{}', record))
    (tmp_path/'p.png').write_bytes(b'x')
    found, said = training_records(tmp_path/name)
    assert found[0]['id'] == 123456789012345678901 and 'All 1 records' in said


READERS = {'t.json': read_json, 't.jsonl': read_jsonl, 'text.json': read_text, 'many.json': lambda p: list(json_values(p)), 'test.json': read_vqa, 'test.csv': read_vqa,
           'test.pkl': plain_pickle, 'test-00000-of-00001.parquet': read_vqa, 'a.json': read_answers, 'a.csv': read_answers, 'a.xlsx': read_answers, 'talk.json': training_records,
           'held.json': lambda p: HeldOut([p]), 'a.xml': lambda p: list(read_articles([p])), 'p.tar.gz': Package, 'p.zip': Package, 'p.png': open_image, 'p.dcm': open_image}


@pytest.mark.parametrize('name', READERS)
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    (tmp_path/name).write_bytes(POINTER)
    with pytest.raises(ValueError) as e: READERS[name](tmp_path/name)
    assert f'{name}: is a Git LFS pointer' in str(e.value) and 'git lfs pull' in str(e.value) and '\n' not in str(e.value)


def test_errors_are_those_of_the_reader(tmp_path):
    (tmp_path/'p').write_bytes(POINTER)
    for read, error in ((read_answers, ScoreError), (open_image, ImageError), (Package, PackageError)):
        with pytest.raises(error): read(tmp_path/'p')


@pytest.mark.parametrize('text, said', [
    ('[{"id": 1}, {"id": 2,, {"id": 3}]', 'record 2'), ('[{"id": 1}, {"id": 2}', 'record 3'), ('[{"id": 1} {"id": 2}]', 'record 2'), ('[1, 2] [3]', 'follows the list'),
    ('{"id": 1}\n{"id": 2\n{"id": 3}\n', 'line 2'), ('[{"id": 1}, {"id": 2, "id": 3}]', "record 2: the key 'id' is there twice"), ('[1, ' + '[' * 100_000, 'record 2 are nested'), ('nonsense', 'line 1')])
def test_damage_is_named_with_its_record(tmp_path, text, said):
    (tmp_path/'x.json').write_text(text)
    with pytest.raises(ValueError) as e: list(json_values(tmp_path/'x.json'))
    assert said in str(e.value) and 'x.json' in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(ValueError, match='x.json'): read_json(tmp_path/'x.json')


def test_a_block_may_end_anywhere(tmp_path, monkeypatch):
    rows = [dict(id=i, text='é"\\\n' * i, more=[None, True, -1.5e3, {'a': {}}]) for i in range(9)]
    (tmp_path/'x.json').write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    for size in range(1, 60):
        monkeypatch.setattr(json_stream, '_BLOCK', size)
        assert list(json_values(tmp_path/'x.json')) == rows


def test_one_object_is_one_value(tmp_path):
    for text in ('{"a": 1}', '\n{\n "a": 1\n}\n'):
        (tmp_path/'x.json').write_text(text)
        assert list(json_values(tmp_path/'x.json')) == [{'a': 1}]


def test_other_letters_are_named_with_their_record(tmp_path):
    for name, read in (('x.json', read_json), ('x.json', lambda p: list(json_values(p))), ('x.json', read_answers)):
        (tmp_path/name).write_bytes('[{"id": "a"}, {"id": "b"}, {"id": "ü"}]'.encode('latin-1'))
        with pytest.raises(ValueError, match='record 3; save it as UTF-8'): read(tmp_path/name)


def test_a_key_that_is_there_twice_is_refused_everywhere(tmp_path):
    with pytest.raises(ValueError, match='twice'): parse_json('{"text": "yes", "text": "no"}')
    (tmp_path/'a.jsonl').write_text('{"id": "a", "text": "yes", "text": "no"}\n')
    with pytest.raises(ScoreError, match="a.jsonl, line 1.*'text' is there twice"): read_answers(tmp_path/'a.jsonl')
