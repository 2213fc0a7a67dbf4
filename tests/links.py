"""The links of the notebooks, the README and the site: internal ones must lead somewhere, external ones are listed.

`python tests/links.py` prints what is broken inside, and the addresses outside; with `--check` it also asks for each of these.
"""
import json, re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'(?<!\\)\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)')
CODE = re.compile(r'```.*?```|``.*?``|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$', re.S)


def text_of(path):
    "The Markdown of a notebook or of a page, without code and formulas."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb': text = '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    return text


def anchors(path):
    "The anchors of its titles: JupyterLab's for a notebook, GitHub's for a page."
    titles = re.findall(r'^#+ +(.+?)\s*$', re.sub(r'```.*?```', '', text_of(path), flags=re.S), re.M)
    if path.suffix == '.ipynb': return {t.replace(' ', '-') for t in titles}
    return {re.sub(r'[^\w\- ]', '', t.lower()).replace(' ', '-') for t in titles}


def of_page(path): return LINK.findall(CODE.sub('', text_of(path)))


def broken_in_page(path):
    "The internal links of a notebook or of a Markdown page that lead nowhere."
    found = []
    for link in of_page(path):
        parts = urlsplit(link)
        if parts.scheme: continue
        target = path if not parts.path else path.parent/unquote(parts.path)
        if not target.exists() or parts.fragment and target.suffix in ('.ipynb', '.md') and unquote(parts.fragment) not in anchors(target): found.append(link)
    return found


class Page(HTMLParser):
    "The links and the anchors of an HTML page."
    def __init__(self, path):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        if tag == 'a' and attrs.get('name'): self.ids.add(attrs['name'])
        for name in ('href', 'src'):
            if attrs.get(name) and not attrs[name].startswith(('data:', 'javascript:')): self.links.append(attrs[name])


def site(folder):
    "(number of internal links, broken ones as (page, link), external ones) of all HTML pages in a folder."
    pages = {p.resolve(): Page(p) for p in folder.rglob('*.html') if '_static' not in p.parts}
    inside, broken, outside = 0, [], set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link.startswith('//'):
                outside.add(link)
                continue
            inside += 1
            target = path if not parts.path else (path.parent/unquote(parts.path)).resolve()
            if target.is_dir(): target /= 'index.html'
            good = target.exists() and (not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids)
            if not good and link != '#': broken.append((path.name, link))
    return inside, broken, sorted(outside)


def pages(): return [*sorted((ROOT/'nbs').glob('*.ipynb')), *sorted((ROOT/'nbs').glob('*.md')), ROOT/'README.md', *sorted((ROOT/'tests').rglob('*.md'))]


def main():
    import urllib.error, urllib.request
    outside = {link for p in pages() for link in of_page(p) if urlsplit(link).scheme}
    for p in pages():
        for link in broken_in_page(p): print(f'broken: {p.relative_to(ROOT)}: {link}')
    if (ROOT/'_docs').exists():
        inside, broken, more = site(ROOT/'_docs')
        outside |= {link for link in more if link.startswith('http')}
        print(f'{inside} internal links on the site')
        for page, link in broken: print(f'broken: {page}: {link}')
    for link in sorted(outside):
        said = ''
        if '--check' in sys.argv:
            request = urllib.request.Request(link, headers={'User-Agent': 'Mozilla/5.0'})
            try: said = urllib.request.urlopen(request, timeout=20).status
            except (urllib.error.URLError, OSError) as e: said = e
        print(link, said)


if __name__ == '__main__': main()
