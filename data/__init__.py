"""Records, prompts and packed groups: everything between a file on disk and the tensors a model sees."""


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: file, line where there is one, and the remedy.

    `star.py` prints it and exits with code 2; a program that imports these modules may catch it.
    """
