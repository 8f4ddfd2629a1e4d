"""Short answers compared: exactly, but for what says nothing."""

import re
import string

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE_NUMBERS = {"零": "0", "没有": "0", "一": "1", "两": "2", "二": "2", "三": "3", "四": "4", "五": "5", "六": "6"}
OPENINGS = ("it is ", "its ", "it's ", "there are ", "there is ", "they are ", "the answer is ")
PUNCTUATION = string.punctuation + "。，！？；：、“”‘’（）"


def normalised(answer: str) -> str:
    """An answer without case, punctuation, articles and an opening such as "it is"; numbers in digits."""
    text = " ".join(answer.lower().split())
    for opening in OPENINGS:
        text = text.removeprefix(opening)
    text = text.translate(str.maketrans(dict.fromkeys(PUNCTUATION, " ")))
    words = [word for word in text.split() if word not in ("a", "an", "the")]
    text = " ".join(str(NUMBERS.index(word)) if word in NUMBERS else word for word in words)
    text = re.sub("^(它是|这是|有|是)|(个|的)$", "", text)
    return CHINESE_NUMBERS.get(text, text)


def is_right(answer: str, expected: str) -> bool:
    """Whether two short answers say the same word for word."""
    return normalised(answer) == normalised(expected)
