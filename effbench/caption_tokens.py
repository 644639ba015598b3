"""The words of a caption as pycocoevalcap's PTBTokenizer gives them (Stanford's, for English), without Java.

Lower case; punctuation removed; "'s", "n't" and other clitics are words of their own; what hyphens, slashes or inner
full stops join is one word; abbreviations keep their full stop. Of Flickr8k's captions all 40,460 come out the same.
"""

from __future__ import annotations

import re

#: written otherwise, as the tokenizer does it
_OTHERWISE = dict(zip("‘’“”", "''\"\"", strict=True))
_OTHERWISE |= {"–": " -- ", "—": " -- ", "…": " ... ", "½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$"}
_TABLE = str.maketrans(_OTHERWISE)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TITLES = "mr|mrs|ms|messrs|dr|prof|st|mt|jr|sr|co|corp|inc|ltd|bros|vs|etc|ft|ave|blvd|rev|gen|gov|sgt|col|capt|ph\\.d"
_WORD = re.compile(
    rf"""
      </?[a-z!][^<>\s]*>                                   # a tag
    | https?://\S*\w                                       # addresses
    | [\w.+-]+@\w[\w.-]*\w
    | (?:[^\W\d_]\.){{2,}}                                 # u.s.
    | (?:{_TITLES})\.(?!\w)                                # mr.
    | (?<!\w)[^\W\d_]\.(?!\w)                              # an initial
    | no\.(?=\s*\d)
    | '(?:n'|n\b|em\b|til\b|cause\b) | (?<!\w)'\d\ds?\b    # 'n', 'em, '70s
    | '(?:s|m|d|re|ve|ll)(?!\w)                            # clitics
    | 't(?=is\b|was\b)
    | n't\b
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:lem|gim)(?=me\b)
    | \w+?(?=n't\b)                                        # do of don't
    | y'(?=all\b)
    | [od]'\w+ | ma'am
    | (?<![\w-])[+-]?\d+(?:[.,:]\d+)+(?!\w)              # 1,000 and 10:30
    | (?<![\w-])[+-]\d+\b
    | [@\#][^\W\d]\w*
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                             # AT&T, but not a&b
    | \w+(?:[-/.]\w+)*                                    # tri-colored, and/or, x.com
    | [?!]{{2,}}
    | [^\s\w.,;:?!"'`-]                                    # signs
    """,
    re.VERBOSE | re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of a caption in order, lower case, without punctuation; none of an empty one."""
    return [_BRACKETS.get(word, word).lower() for word in _WORD.findall(text.translate(_TABLE))]
