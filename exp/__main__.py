"How to begin: what `exp` and `python -m exp` print."
import argparse
from exp import __version__

TEXT = f'''exp {__version__}: deep learning from the foundations, and the training library that its notebooks export.

To train on MNIST, which is in the package, and see the results:
    exp_train --model cnn --test          (all options: exp_train --help)
To list and compare such runs:
    exp_runs
To draw a digit on a page that reads it:
    exp_draw
In Python:
    from exp.nb_10 import Learner         (module nb_NN is what notebook NN exports)
    from exp.all import *                 (all of it, for a scratch notebook)
The notebooks lie in the repository, in nbs/. In a clone, `make lab` opens them.'''


def main():
    parser = argparse.ArgumentParser(prog='exp', description='How to begin.')
    parser.add_argument('--version', action='version', version=f'exp {__version__}')
    parser.parse_args()
    print(TEXT)


if __name__ == '__main__': main()
