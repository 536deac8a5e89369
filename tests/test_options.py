"Multiple choice: options and keys in the forms of other people's files, what is asked, and which answers count."
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from llava_med.data import options as op
from llava_med.data import vqa, vqa_readers
from llava_med.data.options import OptionError, option_list, read_choices, split_options
from llava_med.data.said_options import said_option
from llava_med.evaluate.answer_text import spoken
from llava_med.evaluate.exact import right_answer
from llava_med.evaluate.lmms_tasks import doc_text
from llava_med.evaluate.scorers import SCORERS, score_answers, strict_scores
from llava_med.evaluate.subjects import LogLikelihoodModel
from llava_med.generate.prompts import Prompting

FOUR = ['CT', 'MRI', 'X-ray', 'Ultrasound']
PMC = ('index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n'
       '0,PMC0_F1.jpg,c,What modality is used?,A:CT,B:MRI,C:X-ray,D:Ultrasound,B,test\n'
       '1,PMC1_F1.jpg,c,What is shown?,A:A fracture,B:A mass,C:A cyst,D:An ulcer,A,test\n'
       '2,PMC2_F1.jpg,c,Which organ?,A:Lung,B:Liver,C:Heart,D:Kidney,C,test\n'
       '3,PMC3_F1.jpg,c,Which plane?,A:Axial,B:Coronal,C:Sagittal,D:Oblique,D,test\n')


def picture():
    f = io.BytesIO()
    Image.new('RGB', (8, 8), 'red').save(f, 'PNG')
    return f.getvalue()


def parquet(path, rows):
    import pyarrow as pa, pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def row(**kw): return dict(image=dict(bytes=picture(), path=None), question='What modality is used?') | kw


def told(o): return {k: o.get(k) for k in ('question', 'options', 'answer', 'label', 'answer_type')}


MRI = dict(question='What modality is used?', options=['CT', 'MRI'], answer='MRI', label='B', answer_type='CLOSED')


# Items of every form

@pytest.mark.parametrize('columns', [
    dict(options="['CT', 'MRI']", answer='B'), dict(options='["CT", "MRI"]', answer='MRI'), dict(options="['CT' 'MRI']", answer='b'), dict(options='A. CT\nB. MRI', answer='B.'),
    dict(options='A: CT, B: MRI', answer='(B)'), dict(options='CT | MRI', answer='mri'), dict(options='{"A": "CT", "B": "MRI"}', answer='B. MRI'),
    dict(options={'A': 'CT', 'B': 'MRI'}, answer='B'), dict(options={'A': 'CT', 'B': 'MRI', 'C': None}, label='B'), dict(options={'B': 'MRI', 'A': 'CT'}, answer='B: MRI'),
    dict(options=[dict(letter='A', content='CT'), dict(letter='B', content='MRI')], label='B'), dict(options=[dict(key='A', value='CT'), dict(key='B', value='MRI')], answer_idx='B', answer='MRI'),
    dict(options=['CT', 'MRI'], answer=1), dict(choices=['A. CT', 'B. MRI'], answer='B'), dict(choices=['(A) CT', '(B) MRI'], answer='B) MRI'),
    dict(A='CT', B='MRI', answer='B'), dict(a='CT', b='MRI', answer='b'), dict(option_a='CT', option_b='MRI', option_c=None, gt_answer='MRI'), dict(opa='CT', opb='MRI', answer='B'),
    {'Choice A': 'A:CT', 'Choice B': 'B:MRI', 'Answer': 'B'}, {'Option 1': 'CT', 'Option 2': 'MRI', 'answer': 2}, dict(question='What modality is used?\nA. CT\nB. MRI', answer='B'),
    dict(question='What modality is used? (A) CT (B) MRI', answer='B'), dict(question='What modality is used? Options: A: CT, B: MRI', answer='B'),
    dict(question='What modality is used? Please choose from the following two options: [CT, MRI]', answer='MRI'),
    dict(question="What modality is used?\nA) CT\nB) MRI\nAnswer with the option's letter from the given choices directly.", answer='B'),
    dict(question='<image 1> What modality is used?', options="['CT', 'MRI']", answer='B')])
def test_parquet_in_every_form(tmp_path, columns):
    o, = vqa_readers.read_vqa(parquet(tmp_path / 'test.parquet', [row(**columns)]))
    assert told(o) == MRI and o['split'] == 'test' and 'type_from' not in o and vqa.check_items([o]) == []
    names = {k.lower() for k in columns}
    if not any(isinstance(v, (dict, list)) for v in columns.values()):   # the same as a table and as JSON
        cells = {'image': 'a.jpg', 'question': 'What modality is used?'} | columns
        (tmp_path / 'q.json').write_text(json.dumps([cells]))
        assert told(vqa_readers.read_vqa(tmp_path / 'q.json')[0]) == MRI, names


def test_a_table_with_option_columns_and_its_answers(tmp_path):
    (tmp_path / 'q.csv').write_text('index,image,question,A,B,C,D,answer\n0,0.jpg,What modality is used?,CT,MRI,X-ray,Ultrasound,B\n1,1.jpg,Which organ?,Lung,Liver,,,A\n')
    items = vqa_readers.read_vqa(tmp_path / 'q.csv')
    assert [(o['options'], o['answer'], o['label'], o['answer_type'], o['qid']) for o in items] == [(FOUR, 'MRI', 'B', 'CLOSED', '0'), (['Lung', 'Liver'], 'Lung', 'A', 'CLOSED', '1')]
    for said in (('MRI', 'Lung'), ('B', 'A'), ('B. MRI', 'A) lung')):
        rows, _ = score_answers(items, [dict(question_id=i, prompt=o['question'], text=t) for i, (o, t) in enumerate(zip(items, said))], ['strict'], n_draws=9)
        assert {r['metric']: r['value'] for r in rows if r['slice'] == 'all' and r['metric'].startswith('strict')} == {'strict': 1, 'strict.closed': 1, 'strict.no_option': 0}


@pytest.mark.parametrize('texts, right', [(('B', 'A', 'C', 'D'), 1.), (('B.', 'A.', 'C.', 'D.'), 1.), (('B. MRI', 'A. A fracture', 'C. Heart', 'D. Oblique'), 1.),
    (('The answer is B.', 'The answer is A.', 'Answer: C', 'option D'), 1.), (('**B**', '(a)', 'c', '\\boxed{D}'), 1.), (('MRI', 'A fracture', 'heart', 'It is oblique.'), 1.),
    (('C', 'B', 'D', 'A'), 0.), (('A or B', 'A and C', 'not C', 'none'), 0.), (('B. CT', 'B. A fracture', 'C. Lung', 'A. Oblique'), 0.)])
def test_pmc_vqa_by_letter_text_or_both(tmp_path, texts, right):
    (tmp_path / 'test_2.csv').write_text(PMC)
    items = vqa_readers.read_vqa(tmp_path / 'test_2.csv', part=True)
    rows, _ = score_answers(items, [dict(question_id=i, prompt=o['question'], text=t) for i, (o, t) in enumerate(zip(items, texts))], ['strict'], n_draws=9)
    found = {r['metric']: r['value'] for r in rows if r['slice'] == 'all'}
    assert found['strict'] == found['strict.closed'] == right


def test_one_question_in_training_and_in_asking(tmp_path):
    (tmp_path / 'test_2.csv').write_text(PMC)
    o = vqa_readers.read_vqa(tmp_path / 'test_2.csv', part=True)[0]
    asked = 'What modality is used?\nA. CT\nB. MRI\nC. X-ray\nD. Ultrasound'
    assert vqa.question_record(o)['conversations'][0]['value'] == f'<image>\n{asked}'
    assert Prompting('plain').prompt_of(o) == vqa.item_question(o) == doc_text(o) == asked
    assert Prompting('x', '{options}\n{question}').prompt_of(o) == 'A. CT\nB. MRI\nC. X-ray\nD. Ultrasound\nWhat modality is used?'
    bare = vqa.make_item('x', ['a.jpg'], 'Is  it\nlarge?', 'yes', 'CLOSED', 'test', 'x') | dict(question=' Is  it\nlarge? ')
    assert Prompting('plain').words(bare | dict(question='Is  it\nlarge?')) == 'Is  it\nlarge?' and vqa.item_question(bare) == bare['question']


# Splits and images of Parquet files

def test_the_split_column_counts(tmp_path):
    rows = [row(answer='yes', question=f'Q{i}?', split=s) for i, s in enumerate(('train', 'test', 'validation', 'dev'))]
    path = parquet(tmp_path / 'set/all.parquet', rows)
    assert [o['split'] for o in vqa_readers.read_vqa(path)] == ['train', 'test', 'val', 'val']
    assert [o['question'] for o in vqa_readers.read_vqa(path, 'test')] == ['Q1?']
    assert {o['split'] for o in vqa_readers.read_vqa(parquet(tmp_path / 'b/train.parquet', [row(answer='no', Split='test')]))} == {'test'}
    assert {o['split'] for o in vqa_readers.read_vqa(parquet(tmp_path / 'c/train.parquet', [row(answer='no', split='mini')]))} == {'train'}


@pytest.mark.parametrize('cell', [picture(), dict(bytes=picture(), path='x.png'), [dict(bytes=picture(), path=None)], [picture()], list(picture()), base64.b64encode(picture()).decode(),
                                  'data:image/png;base64,' + base64.b64encode(picture()).decode()], ids=range(7))
def test_images_in_any_form(tmp_path, cell):
    o, = vqa_readers.read_vqa(parquet(tmp_path / 'test.parquet', [row(answer='yes', image=cell)]), images_dir=tmp_path / 'out')
    assert (tmp_path / 'out' / o['images'][0]).read_bytes() == picture()


def test_several_images_and_pixels(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8).tolist()
    o, = vqa_readers.read_vqa(parquet(tmp_path / 'a.parquet', [dict(question='In <image 1> or <image 2>?', answer='both', image_1=dict(bytes=picture()), image_2=dict(bytes=picture()), image_3=None)]))
    assert o['question'] == 'In image 1 or image 2?' and len(o['images']) == 2
    assert len(vqa_readers.read_vqa(parquet(tmp_path / 'b.parquet', [row(answer='yes', image=pixels)]))[0]['images']) == 1
    with pytest.raises(ValueError, match='image of row 0 cannot be read'): vqa_readers.read_vqa(parquet(tmp_path / 'c.parquet', [row(answer='yes', image=b'no image')]))


def test_vlmevalkits_table_and_its_pictures(tmp_path):
    text = base64.b64encode(picture()).decode()
    (tmp_path / 'custom.tsv').write_text(f'index\timage\tquestion\tA\tB\tanswer\tl2-category\n0\t{text}\tWhich?\tCT\tMRI\tB\tx\n1000000\t0\tWhich?\tMRI\tCT\tA\tx\n')
    one, two = vqa_readers.read_vqa(tmp_path, images_dir=tmp_path / 'out')
    assert one['images'] == two['images'] and (tmp_path / 'out' / one['images'][0]).is_file() and [o['answer'] for o in (one, two)] == ['MRI', 'MRI']


# Contradictions: one sentence with file, row and remedy

@pytest.mark.parametrize('columns, said', [
    (dict(options=['CT', 'MRI'], answer='C'), "row 0 has the key 'C', and its options are A to B; correct the key or add the option"),
    (dict(options=['CT', 'MRI'], answer='PET'), "the key 'PET', which is none of its options"), (dict(options=['CT', 'MRI'], answer='A. MRI'), 'letter is not the letter of its text'),
    (dict(options=['CT', 'MRI'], answer='MRI', answer_label='A'), 'name different options; correct one'), (dict(options=['CT', 'ct.'], answer='A'), 'twice .A and B.; correct or remove one'),
    (dict(options={'A': 'CT', 'C': 'MRI'}, answer='C'), 'without a gap'), (dict(options='CT, MRI', answer='MRI'), 'no list; write'), (dict(options=['CT', 'MRI'], answer=5), "the key '5'"),
    (dict(options=['CT', 'MRI'], answer=-1), "the key '-1'"), (dict(options=['CT', 'MRI'], answer='A and B'), 'none of its options'), (dict(options=['CT', 'MRI', 'PET'], answer='1'), 'from 0 or from 1'),
    (dict(A='CT', B='MRI', C='PET', answer=1), 'from 0 or from 1'), (dict(options=['B', 'A'], answer='B'), 'one option as a text and another as a letter'),
    (dict(options=['1', '2', '3'], answer=1), 'from 0 or from 1'), (dict(question='Which?\nA. CT\nB. MRI', options=['PET', 'US'], answer='A'), 'other options in its question')])
def test_contradictions_are_refused_in_words(tmp_path, columns, said):
    path = parquet(tmp_path / 'test.parquet', [row(**columns)])
    with pytest.raises(OptionError, match=said) as e: vqa_readers.read_vqa(path)
    assert 'test.parquet: row 0' in str(e.value) and '\n' not in str(e.value)
    left = []
    with pytest.raises(ValueError, match='no question'): vqa_readers.read_vqa(path, left_out=left)
    assert len(left) == 1


def keys(*values, options=('CT', 'MRI', 'PET'), **kw): return [dict(question='q', options=list(options), answer=v, **kw) for v in values]


def right(rows): return [c.answer for _, c in sorted(read_choices('x', rows).items())]


def test_the_whole_file_decides_what_a_number_is():
    assert right(keys(0, 1, 2)) == ['CT', 'MRI', 'PET'] == right(keys(1, 2, 3)) == right(keys('1', '2', '3')) == right(keys('0', '1', '2'))
    for doubt in (keys('1', '2'), keys(0, 3), keys(*[1, 2] * 10)):
        with pytest.raises(OptionError, match='from 0'): right(doubt)
    assert right(keys(1)) == ['MRI'] and right(keys('2', '3', options=('1', '2', '3'))) == ['2', '3']
    assert right([dict(question='q', options=[1, 2, 3], answer=2)]) == ['2']
    assert right(keys('B', options=('B', 'A')) + keys('A', 'B')) == ['A', 'CT', 'MRI']       # letters, as in the others
    assert right(keys('B', 'AB', options=('B', 'A', 'AB', 'O'))) == ['B', 'AB']              # texts, as AB can only be one


def test_letters_of_nothing_are_named(tmp_path):
    (tmp_path / 'q.csv').write_text('image,question,answer\na.jpg,Which?,A\nb.jpg,Which?,B\nc.jpg,Where?,C\n')
    with pytest.raises(OptionError, match='no column holds options'): vqa_readers.read_vqa(tmp_path / 'q.csv')


@pytest.mark.parametrize('text', ['Was vitamin A. given?', 'In (A) the liver and (B) the spleen, what is bright?', 'Is it A or B?', 'What are the options: surgery?', 'Hepatitis A. B cells are seen. Why?', 'Stage I. or II.?'])
def test_questions_that_only_look_like_it(text):
    assert split_options(text) is None or not read_choices('x', [dict(question=text, answer='the left one')])


def test_real_questions_have_no_options():
    from llava_med.core.runs import test_data
    if not (data := test_data()): pytest.skip('no test data')
    for name in ('vqa_rad/testset.json', 'slake'):
        assert not [o['question'] for o in vqa_readers.read_vqa(data / name) if o['options'] or split_options(o['question'])]


# Which option an answer names

@pytest.mark.parametrize('options, text, place', [
    (FOUR, 'B', 1), (FOUR, ' b. ', 1), (FOUR, '**B. MRI**', 1), (FOUR, '"B"', 1), (FOUR, 'B) MRI', 1), (FOUR, 'The correct option is (B).', 1), (FOUR, 'I would choose option B', 1),
    (FOUR, 'The answer is B because the CT would be darker.', 1), (FOUR, 'The modality is MRI (option B).', 1), (FOUR, 'Not CT, so the answer is MRI.', 1), (FOUR, 'Answer: B\n\nExplanation: A is wrong.', 1),
    (FOUR, 'Option A is incorrect. Option B is correct.', 1), (FOUR, 'The final answer is: $\\boxed{\\text{B}}$', 1), (FOUR, 'B is the correct answer', 1), (FOUR, 'x ray', 2), (FOUR, 'An ultrasound image', 3),
    (FOUR, '{"answer": "B"}', 1), (FOUR, 'Ans: B', 1), (FOUR, 'Step 1: A shows CT. Therefore, B.', 1), (FOUR, 'B is not correct, C is.', 2), (FOUR, '答案是B。', 1), (FOUR, 'La réponse est B.', 1),
    (FOUR, 'Option B (MRI) is correct, option A (CT) is not.', 1), (FOUR, 'The correct choice is B', 1), (FOUR, 'A. CT\nB. MRI\nC. X-ray\nD. Ultrasound', None), (FOUR, 'B. MRI\nA. CT is wrong.', 1),
    (FOUR, 'A and B', None), (FOUR, 'A, B', None), (FOUR, 'B/C', None), (FOUR, 'Either A or B', None), (FOUR, 'It is not B', None), (FOUR, 'B is wrong', None), (FOUR, 'The answer is not B.', None),
    (FOUR, 'A. MRI', None), (FOUR, 'F', None), (FOUR, 'CT or MRI', None), (FOUR, 'a scan', None), (FOUR, 'I do not know', None), (FOUR, '', None),
    (['A mass', 'A fracture', 'No mass'], 'A fracture', 1), (['A mass', 'A fracture', 'No mass'], 'A mass', 0), (['A mass', 'A fracture', 'No mass'], 'A', 0), (['A mass', 'A fracture', 'No mass'], 'no mass', 2),
    (['A mass', 'A fracture', 'No mass'], 'The answer is a fracture', 1), (['Mass', 'Cyst'], 'no mass', None), (['A', 'B', 'AB', 'O'], 'AB', 2), (['A', 'B', 'AB', 'O'], 'D', 3), (['O', 'A'], 'A', None),
    (['1', '2', '3'], '2', 1), (['1', '2', '3'], 'C', 2), (['ER+', 'ER-'], 'ER-', 1), (['< 5 mm', '> 5 mm'], '> 5 mm', 1), (['hepatitis B', 'hepatitis C'], 'It is hepatitis C', 1),
    (['B-cell lymphoma', 'T-cell lymphoma'], 'T-cell lymphoma', 1), (['left', 'right', 'both'], 'The left and the right', None), (['yes', 'no'], 'Yes, B is not it', 0)])
def test_which_option_is_named(options, text, place):
    assert said_option(options, text) == place
    key = dict(question='q', options=options, answer=options[place or 0])
    assert right_answer(key, text) == (place is not None)
    assert strict_scores(key | dict(answer_type='CLOSED'), text)['no_option'] == (place is None)


def test_published_rules_read_letters_of_other_sets_and_stay_on_their_own():
    o = dict(question='q', options=FOUR, answer='MRI', answer_type='CLOSED', source='pmc_vqa')
    for text, credit in (('B', 1.), ('B. MRI', 1.), ('C', 0.), ('MRI', 1.)):
        assert SCORERS['llavamed_v1'](o, text)['closed_substring'] == SCORERS['lmms_slake'](o, text)['accuracy'] == SCORERS['medevalkit'](o, text)['multi_choice'] == credit
    own = dict(o, source='vqa_rad', options=['No', 'yes'], answer='Yes')
    bare = dict(own, options=[])
    for name in ('llavamed_v1', 'medevalkit', 'lmms_slake'):
        for text in ('B', 'Yes', 'no', 'A. yes'): assert SCORERS[name](own, text) == SCORERS[name](bare, text)


# Log-likelihood

class Scored(LogLikelihoodModel):
    "A chooser whose model gives each reply its own log-probability."
    def __init__(self, table, **kw): super().__init__(None, object(), **kw); self.table = table
    def loglikelihood(self, images, prompts, options, batch_size=64): return [[self.table[o] for o in os] for os in options]


def chosen(table, prompt='q\nA. CT\nB. MRI', options=('CT', 'MRI'), **kw):
    (_, line), = next(Scored(table, **kw).generate([dict(id='i', options=list(options))], [[]], [prompt]))
    return line


def test_log_likelihood_by_letter_text_or_both():
    table = {'CT': (-1., 1), 'MRI': (-2., 2), 'A': (-9., 1), 'B': (-.1, 1), 'A. CT': (-9., 3), 'B. MRI': (-8., 4)}
    assert chosen(table)['text'] == chosen(table, by='letter')['text'] == 'MRI' and chosen(table, by='text')['text'] == 'CT'
    assert chosen(table, 'q')['text'] == 'CT'                                        # the prompt lists no letters
    assert chosen(table, [dict(role='user', content=[dict(type='text', text='q\nA. CT\nB. MRI')])])['text'] == 'MRI'
    assert abs(chosen(table)['options'][1]['logprob'] - np.logaddexp.reduce([-2., -.1, -8.])) < 1e-4
    assert 'equally probable' in chosen(table | {'MRI': (-1., 1)}, 'q')['error'] and 'no probability' in chosen(table | {'MRI': (float('nan'), 1)}, 'q')['error']
    blood = chosen({'A. B': (-1., 3), 'B. A': (-2., 3)}, 'q\nA. B\nB. A', ('B', 'A'))
    assert blood['text'] == 'B'                                                      # the replies A and B could mean both


def test_lists_and_arrays():
    assert option_list(np.array(['CT', 'MRI'])) == (['CT', 'MRI'], []) and option_list(('CT', 'MRI'))[0] == ['CT', 'MRI']
    assert option_list(dict(text=np.array(['CT', 'MRI']).tolist(), label=['A', 'B']))[0] == ['CT', 'MRI'] and option_list([2, 3.5])[0] == ['2', '3.5']
    assert op.option_columns(['opa', 'opb', 'cop', 'question']) == dict(opa='A', opb='B')


@pytest.mark.parametrize('said, place', [
    ('B\n\nThe CT is excluded.', 1), ('**B**\n\nCT is wrong, X-ray too.', 1), ('B.\nBecause the MRI shows fat, not CT.', 1), ('{B}', 1),
    ('A\nB\nC\nD', None), ('B\nC', None), ('B\n\nSo the answer is C.', None), ('Everything but CT', None), ('not MRI but CT', 0),
    ('The answer is A. Wait, it is B.', None), ('The answer is A. Actually, the answer is B.', None), ('Answer: A. Actually this is clear.', 0),
    ('It could be CT. Actually, the answer is B.', 1)])
def test_a_letter_on_its_own_line_and_a_turn_of_mind(said, place):
    assert said_option(FOUR, said) == place and right_answer(dict(options=FOUR, answer='MRI'), said) == (place == 1)


@pytest.mark.parametrize('said, place', [('No evidence of pneumonia.', None), ('no signs of viral pneumonia', None), ('There is no acute pneumonia', None),
                                         ('Pneumonia, no evidence of pleural effusion', 0), ('There is no pneumonia', 1)])
def test_an_option_that_is_denied_in_more_words_is_not_named(said, place):
    assert said_option(['Pneumonia', 'No pneumonia', 'Viral pneumonia', 'Pleural effusion'], said) == place


@pytest.mark.parametrize('said, place', [('T2*', 2), ('T2', 1), ('T2*-weighted', 2), ('T2 star', 2), ('*T2*', 1), ('**T2**', 1), ('C. T2*', 2), ('B. T2*', None),
                                         ('The T2* image', 2)])
def test_the_star_of_an_mri_sequence_is_no_markdown(said, place):
    options = ['T1', 'T2', 'T2*', 'FLAIR']
    assert right_answer(dict(options=options, answer='T2*'), said) == (place == 2)
    assert right_answer(dict(options=options, answer='T2'), said) == (place == 1)


def test_pairs_of_an_arrow_map_are_options_and_other_lists_are_not():
    assert option_list([('B', 'MRI'), ('A', 'CT')]) == (['CT', 'MRI'], ['A', 'B'])
    with pytest.raises(OptionError, match='a list among its options; write one text'): option_list([['CT', 'PET', 'US'], ['MRI']])


def test_a_key_that_is_taken_to_count_from_0_is_said(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps([dict(image=f'{i}.png', question='Q?', options=FOUR, answer=i + 1) for i in range(3)]))
    (tmp_path/'b.json').write_text(json.dumps([dict(image=f'{i}.png', question='Q?', options=FOUR, answer=i) for i in range(3)]))
    said = []
    assert [o['answer'] for o in vqa_readers.read_vqa(tmp_path/'a.json', say=said.append)] == FOUR[1:]
    assert [o['answer'] for o in vqa_readers.read_vqa(tmp_path/'b.json', say=said.append)] == FOUR[:3]
    assert '3 keys are numbers, taken to count from 0' in said[0] and 'taken to count' not in said[1]


def test_a_part_of_a_set_leaves_out_what_contradicts_itself(tmp_path):
    (tmp_path/'test_2.csv').write_text(PMC.replace('B:Liver,C:Heart,D:Kidney,C,', 'B:Liver,C:Heart,D:Kidney,E,'))
    with pytest.raises(OptionError, match='row 2 has the key .E.*--part, or vqa_part'): vqa_readers.read_vqa(tmp_path/'test_2.csv')
    said = []
    got = vqa_readers.read_vqa(tmp_path/'test_2.csv', part=True, say=said.append)
    assert [o['row'] for o in got] == [0, 1, 3] and '1 left out because' in said[0] and 'row 2 has the key' in said[0]
    (tmp_path/'PMC0_F1.jpg').write_bytes(picture())
    assert len(vqa_readers.open_vqa(tmp_path/'test_2.csv', part=True)['test']) == 3
    (tmp_path/'test_2.csv').write_text(PMC.replace(',A,test', ',E,test').replace(',B,test', ',E,test').replace(',C,test', ',F,test'))
    with pytest.raises(OptionError, match='3 records are like this and 1 are sound: correct'): vqa_readers.read_vqa(tmp_path/'test_2.csv', part=True)


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path/'q.csv').write_text('image,question,answer,Answer\na.png,Q?,yes,no\n')
    with pytest.raises(ValueError, match="q.csv: has two columns 'answer'; keep the one"): vqa_readers.read_vqa(tmp_path/'q.csv')


@pytest.mark.parametrize('options, said, place', [
    (['Benign', 'Malignant'], 'non-malignant', None), (['Grade 1', 'Grade 2'], 'Grade 2-3', None), (['Grade 1', 'Grade 2'], 'grade two', 1),
    (['< 5 mm', '5 mm', '> 5 mm'], 'less than 5 mm', None), (['< 5 mm', '5 mm', '> 5 mm'], 'about 5 mm', 1), (['-5', '5'], 'minus 5', None),
    (['1', '2', 'More than 2'], 'more than two', 2), (['Left upper lobe', 'Right lower lobe', 'Right upper lobe'], 'Right upper lobe (option B)', None),
    (FOUR, 'C would be the best option.', 2), (FOUR, 'B\u200b', 1), (FOUR, '\ufeffB', 1), (FOUR, '**Final Answer**\n\nB', 1), (FOUR, 'assistant\nB', 1)])
def test_numbers_compared_prefixes_and_marks_without_a_width(options, said, place):
    for key in options: assert right_answer(dict(options=options, answer=key), spoken(said)) == (place is not None and options[place] == key)
