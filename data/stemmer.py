"""The Porter stemmer that ROUGE-L compares words by: "flights" and "flight" are one word to the reward.

M. F. Porter, "An algorithm for suffix stripping", 1980, with the extensions that NLTK has on by default and
`rouge_score` therefore uses. They are marked (+) below; tests/test_reward.py compares 20,000 words with NLTK.

A word is read as a string of c (consonant) and v (vowel); y is a vowel after a consonant. The measure m counts the
places where vowels turn to consonants: tr-ee 0, tr-oubl-e 1, tr-oubl-es 1, pr-iv-at-e 2.
"""
from functools import lru_cache

IRREGULAR = {word: stem for stem, words in {  # (+)
    "sky": "sky skies", "die": "dying", "lie": "lying", "tie": "tying", "news": "news", "inning": "inning innings",
    "outing": "outing outings", "canning": "canning cannings", "howe": "howe", "proceed": "proceed",
    "exceed": "exceed", "succeed": "succeed"}.items() for word in words.split()}

# Of each step, the first suffix that fits is the one that counts; where its condition on m fails, nothing happens.
STEP2 = [pair.split(":") for pair in (
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e ousli:ous ization:ize "
    "ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble fulli:ful").split()]
STEP3 = [pair.split(":") for pair in "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:".split()]
STEP4 = tuple("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split())
KINDS = str.maketrans({letter: "v" if letter in "aeiou" else "c" for letter in "abcdefghijklmnopqrstuvwxz0123456789"})


def shape(word):
    """The word, of a-z and 0-9, as c and v.

    >>> shape("syzygy"), shape("yes")
    ('cvcvcv', 'cvc')
    """
    form = word.translate(KINDS)
    while (y := form.find("y")) >= 0:
        form = form[:y] + ("v" if form[y - 1:y] == "c" else "c") + form[y + 1:]
    return form


def measure(word):
    """m: how often a vowel is followed by a consonant."""
    return shape(word).count("vc")


def short(word):
    """Whether it ends consonant-vowel-consonant, the last not w, x or y; or is vowel-consonant as a whole (+)."""
    form = shape(word)
    return form[-3:] == "cvc" and word[-1] not in "wxy" or form == "vc"


@lru_cache(maxsize=1 << 16)
def stem(word):
    """The stem of a lower-case word.

    >>> [stem(word) for word in ("flights", "relational", "hopefulness", "dying", "generously")]
    ['flight', 'relat', 'hope', 'die', 'gener']
    """
    if word in IRREGULAR or len(word) <= 2 or word[-1] in "abfhjkopqvwxz0123456789":  # no suffix ends in these
        return IRREGULAR.get(word, word)
    return step5(step4(step3(step2(step1(word)))))


def step1(word):
    """Plurals, -ed and -ing, and a final y."""
    if word.endswith("ies") and len(word) == 4:  # (+) dies, die
        word = word[:-1]
    elif word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]

    if word.endswith("ied"):  # (+)
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("eed"):
        word = word[:-1] if measure(word[:-3]) > 0 else word
    else:
        root = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
        if "v" in shape(root):
            word = root
            if word.endswith(("at", "bl", "iz")):
                word += "e"
            elif word[-2:-1] == word[-1] and shape(word)[-1] == "c":  # hopp-ing, but fall-ing
                word = word if word[-1] in "lsz" else word[:-1]
            elif measure(word) == 1 and short(word):
                word += "e"

    if word.endswith("y") and len(word) > 2 and shape(word)[-2] == "c":  # (+) happy, happi; but by, say
        word = word[:-1] + "i"
    return word


def step2(word):
    """Double suffixes to single ones."""
    if word.endswith("alli") and measure(word[:-4]) > 0:  # (+) first, and then what -al may be part of
        return step2(word[:-2])
    for suffix, other in STEP2 if word[-1:] in "lirnms" else ():  # what these end in
        if word.endswith(suffix):
            return word.removesuffix(suffix) + other if measure(word.removesuffix(suffix)) > 0 else word
    if word.endswith("logi") and measure(word[:-3]) > 0:  # (+) the l counts
        return word[:-1]
    return word


def step3(word):
    """-ic-, -full, -ness."""
    for suffix, other in STEP3:
        if word.endswith(suffix):
            return word.removesuffix(suffix) + other if measure(word.removesuffix(suffix)) > 0 else word
    return word


def step4(word):
    """Single suffixes go, where two syllables or more remain."""
    for suffix in STEP4 if word.endswith(STEP4) else ():  # one question for most words
        if word.endswith(suffix):
            root = word.removesuffix(suffix)
            return root if measure(root) > 1 and (suffix != "ion" or root[-1] in "st") else word
    return word


def step5(word):
    """A final -e, then a final -ll."""
    if word.endswith("e"):
        m = measure(word[:-1])
        word = word[:-1] if m > 1 or m == 1 and not short(word[:-1]) else word
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word
