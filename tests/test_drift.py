"What the drift check takes for the same output, and what not."
import base64, struct
import pytest
from drift import faults


def cell(text, width=None):
    outputs = [dict(output_type='stream', name='stdout', text=text)]
    if width:
        png = base64.b64encode(b'\x89PNG\r\n\x1a\n' + b'\0\0\0\rIHDR' + struct.pack('>II', width, 100) + b'\x08' + bytes(20)).decode()
        outputs.append(dict(output_type='display_data', data={'text/markdown': f'<img src="data:image/png;base64,{png}">', 'text/plain': 'a figure'}))
    return dict(cell_type='code', source='', outputs=outputs)


TABLE = 'epoch  train_loss  seconds\n    0      {}     {}\n'

@pytest.mark.parametrize('old, new', [
    ('loss 0.5', 'loss 0.50001'), ('it took 3.5 ms', 'it took 20 µs'), (TABLE.format(0.25, 1.5), TABLE.format(0.25, 9.5)), ('a  b', 'a b'), ('nan', 'nan')])
def test_the_same(old, new): assert faults(cell(old), cell(new), {})[0] == []


@pytest.mark.parametrize('old, new', [
    ('loss 0.5', 'loss 0.51'), ('three of 5', 'four of 5'), ('1 2', '1 2 3'), (TABLE.format(0.25, 1.5), TABLE.format(0.26, 1.5)), ('0.5', 'nan'), ('5', '-5')])
def test_not_the_same(old, new): assert faults(cell(old), cell(new), {})[0] != []


def test_bands_are_for_one_number():
    old, new = cell('0.5 and 0.5'), cell('0.52 and 0.5')
    assert faults(old, new, {'0': 0.1})[0] == [] and faults(old, new, {'1': 0.1})[0] != [] and faults(old, new, None)[0] == []


def test_figures():
    assert faults(cell('', 100), cell('', 105), {})[0] == []
    for other in (cell('a figure'), cell('', 200)): assert faults(cell('', 100), other, {})[0] != []
