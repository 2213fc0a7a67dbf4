"""Builds the site from the notebooks: `python docs/build.py`.

Nothing is written twice. The landing page is cut from `index.ipynb`, the reference is made of the modules' own documentation,
and the notebooks are shown as they are stored. `_proc/pages` holds what Sphinx reads, `_docs/` is the site.
"""
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import reference

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES, BUILT, OUT = ROOT/'_proc/pages', ROOT/'_proc/html', ROOT/'_docs'
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
DRAW = '<a href="draw.html">Draw a digit</a>, and see what the network of [23_resnet](23_resnet.ipynb) reads.'
MATHJAX = ROOT/'.venv'/'npm'/'mathjax'/'es5'/'tex-svg.js'


def source(cell): return ''.join(cell['source'])
def markdown(text): return dict(cell_type='markdown', metadata={}, source=text)


def local(text):
    "Links of the front page, which lies in nbs/, as they are on the site."
    text = text.replace('](index.ipynb', '](index.md').replace('](../tests/benchmarks/results/', '](')
    return text.replace('](../nbs/', '](')


def sections():
    "The parts of the front page by title; the first has the title ''."
    cells = json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    found, title = {}, ''
    for cell in cells:
        text = local(source(cell))
        if m := re.match(r'## (.+)\n', text): title, text = m[1], text[m.end():]
        found[title] = found.get(title, '') + text.strip() + '\n'
    return found


def toctree(entries, caption): return '\n'.join(['```{toctree}', ':hidden:', ':maxdepth: 1', f':caption: {caption}', '', *entries, '```', ''])


def landing(parts):
    "What it is, a picture, two commands, the map; and the order of all pages."
    intro, commands, the_map = parts[''], parts['Two commands'], parts['The map']
    title, quote, rest = intro.split('\n\n', 2)
    last = rest.strip().split('\n\n')[-1]
    picture = re.findall(r'^!\[.*\)$', commands, re.M)[-1]
    two = [f'```\n{command}\n```\n\n{says.replace(chr(10), " ")}\n' for command, says in re.findall(r'^```\n(make \w+)\n```\n\n([^.]+\.)', commands, re.M)]
    out = [title, '', quote, '', last, '', picture, '', DRAW, '', '## Two commands', '', *two, 'More of it: [getting started](start.md).', '', '## The map', '', the_map]
    group, groups = None, {}
    for line in the_map.splitlines():
        if m := re.match(r'\| \*\*(.+?)\*\*', line): group = groups.setdefault(m[1], [])
        if m := re.match(r'\| \[(\d\d_\w+)\]', line): group.append(m[1])
    titles = {p.stem: source(json.loads(p.read_text(encoding='utf-8'))['cells'][0]).splitlines()[0].removeprefix('# ') for p in NOTEBOOKS}
    assert sorted(sum(groups.values(), [])) == [p.stem for p in NOTEBOOKS], 'a notebook is missing on the map'
    out += [toctree(['start', 'modules', 'coming_from', 'speed'], 'Begin')]
    out += [toctree([f'{stem[:2]} {titles[stem]} <{stem}>' for stem in stems], name) for name, stems in groups.items()]
    out += [toctree(['changes', *[f'reference/nb_{p.stem[:2]}' for p in NOTEBOOKS]], 'Reference'), toctree(['contribute', 'peers'], 'More')]
    return '\n'.join(out), titles


def built(names):
    "Below a cell that exports: links to the reference of what it defines, and the place that the reference links back to."
    marks = ''.join(f'(built-{n.anchor})=\n' for n in names)
    links = ', '.join(f'[{n.name}](reference/nb_{n.number}.md#{n.anchor})' for n in names)
    return markdown(f'{marks}{{.built}}\nReference: {links}')


def stage(path, names):
    "A notebook for the site: with links to the reference, the cells at the top folded."
    notebook = json.loads(path.read_text(encoding='utf-8'))
    by_cell, cells = {}, []
    for n in names: by_cell.setdefault(n.cell, []).append(n)
    for cell in notebook['cells']:
        if cell['cell_type'] == 'markdown': cell['source'] = local(source(cell))
        elif cell['metadata'].get('jupyter', {}).get('source_hidden'): cell['metadata']['tags'] = ['hide-input']
        cells.append(cell)
        if here := by_cell.get(cell['id']): cells.append(built(here))
    for cell in cells: cell.pop('id', None)
    notebook['cells'], notebook['nbformat_minor'] = cells, 4
    notebook['metadata']['language_info'] = dict(name='python', pygments_lexer='ipython3')
    (PAGES/path.name).write_text(json.dumps(notebook, ensure_ascii=False), encoding='utf-8')


def write_pages():
    "All that Sphinx reads."
    shutil.rmtree(PAGES.parent, ignore_errors=True)
    (PAGES/'reference').mkdir(parents=True)
    parts, found = sections(), reference.collect(ROOT, NOTEBOOKS)
    text, titles = landing(parts)
    pages = {
        'index': text,
        'start': '# Getting started\n\n' + parts['Two commands'] + '\n## Other ways in\n\n' + parts['Other ways in'] + '\n## On Colab\n\n' + parts['On Colab'] + '\n## Licence\n\n' + parts['Licence'],
        'modules': '# Using the modules\n\n' + parts['Using the modules'] + '\n## The key of short names\n\n' + parts['The key of short names'],
        'speed': '# How fast it is\n\n' + parts['How fast it is'],
        'contribute': '# Adding or changing a notebook\n\n' + parts['Adding or changing a notebook'],
        'coming_from': local((ROOT/'nbs/coming_from.md').read_text(encoding='utf-8')),
        'peers': (ROOT/'tests/benchmarks/results/peers.md').read_text(encoding='utf-8')}
    changes = ['# What changed since\n', 'For every notebook the names that it adds, and the earlier names that it improves.\n']
    for path in NOTEBOOKS:
        number = path.stem[:2]
        changes += [f'## {path.stem}\n', *reference.changed(path, found[number])]
        pages[f'reference/nb_{number}'] = reference.page(path, found[number], titles[path.stem])
        stage(path, found[number])
    pages['changes'] = '\n'.join(changes)
    for name, text in pages.items(): (PAGES/f'{name}.md').write_text(text, encoding='utf-8')
    for picture in [*(ROOT/'nbs').glob('*.png'), *(ROOT/'tests/benchmarks/results').glob('*.png')]: shutil.copy(picture, PAGES)


def accessible(text):
    "A page whose wide tables scroll by themselves, by the theme's own means, and whose labels for screen readers agree with the text."
    text = re.sub(r'(<table class="table">.*?</table>)', r'<div class="pst-scrollable-table-container">\1</div>', text, flags=re.S)
    text = text.replace(' aria-label="Toggle hidden content"', '')
    return re.sub(r'(<button class="[^"]*search-button-field[^>]*?) aria-label="Search"', r'\1', text)


def draw_page(path):
    "The page to draw a digit on, of the network that comes with the library, with a way back."
    from exp.nb_01 import get_test_data
    from exp.nb_23 import load_pretrained
    from exp.nb_32 import export_model
    text = export_model(load_pretrained(), path, get_test_data()[0][:500]).read_text(encoding='utf-8')
    path.write_text(text.replace('</main>', '<p><a href="index.html">To the notebooks</a></p>\n</main>'), encoding='utf-8')


def main():
    write_pages()
    subprocess.run([sys.executable, '-m', 'sphinx', '-b', 'html', '-q', '-j', 'auto', '-W', '--keep-going', '-c', HERE, PAGES, BUILT], check=True,
                   env=dict(os.environ, PYTHONPATH=str(HERE)))
    shutil.copy(MATHJAX, BUILT/'_static')
    for page in BUILT.rglob('*.html'): page.write_text(accessible(page.read_text(encoding='utf-8')), encoding='utf-8')
    for path in NOTEBOOKS: shutil.copy(path, BUILT/'_sources'/path.name)  # to download: the notebook itself
    draw_page(BUILT/'draw.html')
    shutil.rmtree(BUILT/'.doctrees')
    shutil.rmtree(OUT, ignore_errors=True)
    BUILT.rename(OUT)  # a site that is whole takes the place of the old one


if __name__ == '__main__': main()
