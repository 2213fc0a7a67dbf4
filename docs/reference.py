"Pages about the names that the notebooks export: what each does and takes, where it is built, and who uses it."
import ast, importlib, inspect, re, textwrap
from dataclasses import dataclass, field
from fastcore.docments import docments

IMPORT = re.compile(r'^\s*from exp\.nb_(\d+) import (.+)$', re.M)


@dataclass
class Name:
    "An exported name, or a method that a notebook adds to an earlier class."
    name: str                  # Learner, Learner.fit_one_cycle
    number: str                # of the notebook that builds it: '10'
    value: object = None
    used: list = field(default_factory=list)  # stems of the notebooks that import it
    cell: str = ''             # id of the cell that exports it
    bases: list = field(default_factory=list)  # exported classes that it extends

    @property
    def anchor(self):  # in small letters, as Sphinx wants them; so a class needs a mark, for there are Summary and summary
        return f'nb-{self.number}-{"class-" if inspect.isclass(self.value) else ""}{self.name.replace(".", "-").lower()}'


def patches(tree):
    "(class, function) of the methods that a module adds to classes of others."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any('patch' in ast.unparse(d) for d in node.decorator_list):
            if node.name.startswith('_'): continue
            for cls in re.findall(r'\w+', ast.unparse(node.args.args[0].annotation)): yield cls, node.name


def cells_of(text):
    "The id of the notebook cell in which each top-level name of a module is defined."
    found, tree = {}, ast.parse(text)
    marks = [(n, m[1]) for n, line in enumerate(text.splitlines(), 1) if (m := re.match(r'# %% .*\.ipynb #(\S+)', line))]
    for node in tree.body:
        names = [getattr(node, 'name', None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [t.id for t in getattr(node, 'targets', [getattr(node, 'target', None)]) if isinstance(t, ast.Name)]
        cell = next((cell for line, cell in reversed(marks) if line <= node.lineno), '')
        for name in names:
            if name: found.setdefault(name, cell)
    return found


def collect(root, notebooks):
    "All names by the number of their notebook, in the order of the modules."
    found, origin = {}, {}
    for path in notebooks:
        number, file = path.stem[:2], root/'exp'/f'nb_{path.stem[:2]}.py'
        module, text = importlib.import_module(f'exp.nb_{number}'), file.read_text(encoding='utf-8')
        where = cells_of(text)
        names = [Name(n, number, getattr(module, n), cell=where.get(n, '')) for n in module.__all__]
        for cls, func in patches(ast.parse(text)):
            owner = getattr(module, cls)
            if owner.__module__ == module.__name__: continue  # a long class, written in pieces
            names.append(Name(f'{cls}.{func}', number, vars(owner)[func], cell=where.get(func, '')))
        for n in names:
            if inspect.isclass(n.value):
                n.bases = [origin[b] for b in n.value.__mro__[1:] if b in origin and origin[b].number != number]
        for n in names:
            if inspect.isclass(n.value): origin.setdefault(n.value, n)
        found[number] = names
    by_name = {(n.number, n.name): n for names in found.values() for n in names}
    for path in notebooks:
        for number, names in IMPORT.findall(path.read_text(encoding='utf-8').replace('\\n', '\n').replace('"', '\n')):
            for name in re.findall(r'\w+', names):
                n = by_name.get((number, name))
                if n and path.stem not in n.used: n.used.append(path.stem)
    return found


def is_method(name, value):
    "A public method, property or class method with documentation of its own."
    func = value.fget if isinstance(value, property) else getattr(value, '__func__', value)
    return not name.startswith('_') and inspect.isfunction(func) and bool(inspect.getdoc(func))


def call(value, name):
    "How it is called, one parameter a line when it is long."
    func = value.fget if isinstance(value, property) else value
    try: sig = inspect.signature(func)
    except (TypeError, ValueError): return name
    if isinstance(value, property): return name
    params = [re.sub(r"<function (\w+) at 0x\w+>|<class '(?:\w+\.)*(\w+)'>|exp\.nb_\d+\.|functools\.| at 0x[0-9a-f]+", r'\1\2', str(p))
              for k, p in sig.parameters.items() if k not in ('self', 'cls')]
    line = f'{name}({", ".join(params)})'
    return line if len(line) <= 88 else f'{name}(\n    ' + ',\n    '.join(params) + ')'


def escape(text):
    "Text in a cell of a table."
    return re.sub(r'\s+', ' ', str(text)).replace('|', r'\|').replace('<', r'\<').replace('$', r'\$').replace('*', r'\*')


def raises(func):
    "(exception, message) of what a function raises itself."
    try: tree = ast.parse(textwrap.dedent(inspect.getsource(func)))
    except (OSError, TypeError, SyntaxError): return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            if not name.endswith(('Error', 'Exception')): continue
            text = ''.join(part.value if isinstance(part, ast.Constant) else '…' for arg in node.exc.args[:1]
                           for part in getattr(arg, 'values', [arg]) if isinstance(part, (ast.Constant, ast.FormattedValue)))
            if (name, text) not in found: found.append((name, text))
    return found


def parameters(value):
    "A table of parameters with what their comments say, or nothing."
    func = value.__init__ if inspect.isclass(value) and '__init__' in vars(value) else value
    if isinstance(func, property): func = func.fget
    try: docs = docments(func, full=True, returns=True)
    except Exception: return ''
    rows = []
    for k, v in docs.items():
        if k in ('self', 'cls') or not v.docment: continue
        text, _, gives = ('', '', v.docment) if k == 'return' else re.sub(r'\s+', ' ', v.docment).partition('-> ')
        if text.strip(): rows.append(f'| `{k}` | {escape(text.strip().removesuffix(";"))} |')
        if gives: rows.append(f'| returns | {escape(gives)} |')
    return '| parameter | what it is |\n|---|---|\n' + '\n'.join(rows) + '\n' if rows else ''


def entry(title, value, level):
    "What is said about one name or method."
    out = [f'{"#"*level} {title.replace("_", chr(92) + "_")}\n']
    if not callable(value) and not isinstance(value, (property, classmethod, staticmethod)):
        text = repr(value)
        return [*out, f'A value of type `{type(value).__name__}`' + (f': `{text}`\n' if len(text) < 70 and '`' not in text and '/' not in text else '.\n')]
    value = getattr(value, '__func__', value)
    out.append(f'```python\n{call(value, title)}\n```\n')
    own = (vars(value).get('__doc__') or '') if inspect.isclass(value) else inspect.getdoc(value)
    if own and not own.startswith(f'{title}('): out.append(own.replace('<', r'\<').replace('$', r'\$') + '\n')
    if table := parameters(value): out.append(table)
    init = vars(value).get('__init__') if inspect.isclass(value) else value.fget if isinstance(value, property) else value
    if init and (errors := raises(init)):
        out.append('Raises ' + '; '.join(f'`{e}`' + (f' ({escape(t)})' if t else '') for e, t in errors) + '.\n')
    return out


def source_of(value):
    "The source, folded."
    value = getattr(value, '__func__', value)
    try: text = inspect.getsource(value.fget if isinstance(value, property) else value)
    except (OSError, TypeError): return []
    return [f'<details><summary>Source</summary>\n\n```python\n{textwrap.dedent(text).rstrip()}\n```\n\n</details>\n']


def page(path, names, title):
    "The reference of one module, as Markdown."
    number = path.stem[:2]
    out = [f'# exp.nb_{number}: {title}\n', f'Built in [{path.stem}](../{path.stem}.ipynb).\n', *changed(path, names)]
    for n in names:
        out += [f'({n.anchor})=', *entry(n.name, n.value, 2)]
        used = '; used in ' + ', '.join(f'[{s}](../{s}.ipynb)' for s in n.used) if n.used else ''
        out.append(f'[Where it is built](../{path.stem}.ipynb#built-{n.anchor}){used}\n')
        if inspect.isclass(n.value):
            for k, v in vars(n.value).items():
                if is_method(k, v) and getattr(getattr(v, '__func__', v.fget if isinstance(v, property) else v), '__module__', '') == f'exp.nb_{number}':
                    out += entry(f'{n.name}.{k}', v, 3)
        out += source_of(n.value)
    return '\n'.join(out)


def changed(path, names):
    "What a notebook adds, and which earlier names it improves."
    link = lambda n: f'[`{n.name}`](#{n.anchor})'
    new = [n for n in names if '.' not in n.name]
    added = [n for n in names if '.' in n.name]
    out = ['**New:** ' + ', '.join(map(link, new)) + '.\n'] if new else []
    if added: out.append('**Earlier names that can do more now:** ' + ', '.join(map(link, added)) + '.\n')
    based = [(n, n.bases[0]) for n in new if n.bases]
    if based: out.append('**Built on earlier names:** ' + ', '.join(f'{link(n)} on [`{b.name}`](#{b.anchor})' for n, b in based) + '.\n')
    return out
