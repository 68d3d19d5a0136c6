"""The text of a story: repairing it, its ending, its words, and its fingerprint, in any language."""
import hashlib
import re
import unicodedata

import regex

# Mojibake: UTF-8 that was read as cp1252, so that each character became two to four: "don’t" is now "donâ€™t". What
# each byte from 80 to FF becomes; control characters stand for the five that cp1252 lacks, and in Latin-1 for more.
CP1252 = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0x100))
TO_LATIN1 = str.maketrans(CP1252, "".join(map(chr, range(0x80, 0x100))))
TAIL = f"[{CP1252[:64]}\x80-\x9f]"  # any byte of a character but its first, which tells how many there are
# Latin letters, punctuation, emojis. Misread letters of other scripts can look like right text, so they stay.
MOJIBAKE = re.compile(f"[Â-Å]{TAIL}|â{TAIL}{TAIL}|ï»¿|ð[Ÿ\x9f]{TAIL}{TAIL}")
QUOTES = str.maketrans("“”„«»‘’`", "\"\"\"\"\"'''")


def clean_story(record):
    """The story of a record without white space around it, and with mojibake undone, also if it happened twice. If
    spans point into the story, it stays as it is."""
    story, before = record["story"], None
    if record.get("spans"):
        return story
    while story != before and not story.isascii():
        story, before = fix_mojibake(story), story
    return story.removeprefix("\ufeff").strip()  # a byte-order mark that was misread too


def fix_mojibake(story):
    """A story with mojibake undone: everywhere, if no other character is beyond ASCII, since the story was then misread
    as a whole; else only what begins with â€, which right text never has: quotation marks, dashes, dots."""
    story = re.sub(f"â€(?!{TAIL})\ufffd?", "â€\x9d", story)  # the third byte is lost: it was ”’s, mostly
    misread = MOJIBAKE if MOJIBAKE.sub("", story).isascii() else re.compile(f"â€{TAIL}")
    return misread.sub(lambda match: match[0].translate(TO_LATIN1).encode("latin-1").decode(), story)


# What a finished story ends in, perhaps in bold type: punctuation of any script, a closing quote or bracket, an emoji,
# or The End. Thai and Lao have no final punctuation.
ENDING = regex.compile(r"""(?ix)
    (?: [\p{Sentence_Terminal}…།"'\p{Pe}\p{Pf}\p{Extended_Pictographic}\p{So}\p{Thai}\p{Lao}]
      | (?<!\s)\p{Pi} | (?<=\p{Greek}); | (?<!\w)the\ end
      | (?<=[\p{Sentence_Terminal}…"'\p{Pe}\p{Pf}\n][\s*_~—–-]*)
        (?:fin|fine|ende|fim|koniec|einde|slut|konec|конец|完|終|终|끝|おしまい|समाप्त) )
    [\s*_~=—–\-\#\p{M}\p{Sk}\p{Cf}]* \Z""")


def ends_well(story):
    """Whether a story is finished, and not cut off."""
    ending = story.rstrip()[-60:]
    return ending.endswith((".", "!", "?", '"', "”")) or bool(ENDING.search(ending))  # the former is fast


# In these scripts no spaces stand between words: there, each character counts as a word.
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
LETTERS = regex.compile(rf"(?V1)[{SPACELESS}]\p{{M}}*|[\w--[\d_{SPACELESS}]]+")  # a word without digits


def split_words(text):
    """The words of a text, with their punctuation: what stands between spaces, or single characters without any."""
    return regex.findall(rf"[{SPACELESS}]\p{{M}}*|[^\s{SPACELESS}]+", text)


def word_end(text, position):
    """The first position from `position` on at which a word may end, or `position` itself if there is none."""
    match = regex.compile(rf"(?= )|(?<=[{SPACELESS}])(?!\p{{M}})").search(text, position)
    return match.start() if match else position


def fingerprint(story):
    """64 bits of a story's text, the same for copies that differ only in case, quotes and white space.

    Among 3 million stories, the chance that any two different ones share a fingerprint is one in 4 million."""
    if not story.isascii():
        story = unicodedata.normalize("NFKC", story).translate(QUOTES)  # é as one character or two, … as three dots
    normal = " ".join(story.lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")
