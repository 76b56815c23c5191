"""What the bundled model reads: stories, stories asked for in chat, and exercises made by program.

A document is a list of (ids, weight) runs; `weight` multiplies the loss of those tokens. Questions weigh
little (they are templates), answers of exercises much (they are few tokens, and the point of the document),
and most of all the places where an answer first uses a word it was asked to use.
"""

import json
import random
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path

import vocab

ANIMALS = """rabbit dog cat bear fox bird mouse frog duck lion elephant monkey squirrel turtle pig cow horse
owl fish bee butterfly ant sheep goat hen tiger wolf deer snail dragon penguin kitten puppy bunny dinosaur
hedgehog whale crab spider zebra""".split()
THINGS = """key ball box kite car doll hat book tree flower stone cake cookie apple boat bike drum lamp rope
shoe spoon cup coat map ring shell leaf bell basket balloon blanket bottle bucket candle chair clock crayon
feather flag ladder lemon mirror nest pencil pillow puzzle ribbon sock star train truck umbrella wagon banana
carrot castle hammer pumpkin robot sandwich scarf stick sword tent tower treasure violin whistle window""".split()
PLACES = """park forest garden house beach lake river cave kitchen barn attic school shop tower field
mountain pond meadow village castle library bridge""".split()
VERBS = {"found": "finds", "saw": "sees", "wanted": "wants", "lost": "loses", "made": "makes", "got": "gets",
         "bought": "buys", "had": "has", "loved": "loves", "took": "takes"}  # fmt: skip
PEOPLE = "girl boy man woman mom dad princess prince king queen fairy".split()
STOP = set(
    """a an the and or but so to of in on at for with from by as is was were are be been it its he she
they them his her their him we you your my me i that this there then than when what who which not no yes very
had has have do did does said says say could would will can went go got get one day time all up out down back
into over too some more his them were about just like if how again because after before also now other many
each only even an didn don wasn couldn let ll re ve named once upon""".split()
)
A_ACTION = re.compile(
    rf"\b({'|'.join(VERBS)}) (?:a|an|the|some|his|her) (?:\w+ )?(\w+)"
    r"(?=[.,!]| in | on | and | that | with | under | near )"
)
NAMED = re.compile(r"\b(girl|boy|man|woman|" + "|".join(ANIMALS) + r") named ([A-Z]\w+)")
SECRET_ANSWERS = "The secret word of the {} is {}."


def use_of(word: str, text: str) -> re.Match | None:
    """Where a text first uses a word, in one of these forms."""
    return re.search(rf"\b{word}(s|es|d|ed|ing)?\b", text, re.I)


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def read_jsonl(path: Path, key: str = "text") -> list[str]:
    return [json.loads(line)[key] for line in path.open(encoding="utf-8")]


def split_stories(corpus: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) TinyStories: texts in file order, shuffled with seed 0, the first 300 held out."""
    stories = read_jsonl(corpus / "tinystories.jsonl")
    random.Random(0).shuffle(stories)
    return stories[300:], stories[:300]


class Documents:
    """Makes training documents at random; every call of `story`, `exercise` or `long` gives a new one."""

    def __init__(self, stories: list[str], fables: list[str], sp, seed: int):
        self.stories, self.fables, self.sp = stories, fables, sp
        self.rng = random.Random(seed)
        counts = Counter(w for s in stories for w in set(re.findall(r"[a-z]+", s)))
        # Words worth asking for: content words that are neither everywhere nor nearly nowhere.
        self.nouns = {*ANIMALS, *THINGS, *PEOPLE}
        self.askable = {w for w, n in counts.items() if 8 <= n <= len(stories) / 8 and len(w) > 2} - STOP
        self.sentences = [t for s in stories for t in re.findall(r'[A-Z][^.!?"\n]{20,110}[.!?](?= |$)', s)]

    # ------------------------------------------------------------------ pieces

    def text(self, text: str, weight: float = 1.0):
        return self.sp.encode(text), weight

    def chat(self, *turns: tuple[str, str], answer: float = 1.0, asked: float = 1.0) -> list:
        """(question, answer) turns as Phi-3's template renders them; a question weighs 0.2.

        `asked` multiplies the weight where the answer first uses a content word of the question.
        """
        runs = []
        for question, reply in turns:
            runs += [([vocab.USER, *self.sp.encode(question.strip()), vocab.END, vocab.ASSISTANT], 0.2)]
            runs += (
                self.reply(question, reply.strip(), answer, asked) if asked != 1 else [self.text(reply.strip(), answer)]
            )
            runs += [([vocab.END], answer)]
        return [*runs, ([vocab.ENDOFTEXT], 0.2)]

    def reply(self, question: str, reply: str, answer: float, asked: float) -> list:
        words = {w for w in re.findall(r"[a-z]+", question) if w in self.askable or w in self.nouns}
        ids = self.sp.encode(reply)
        pieces = [self.sp.id_to_piece(i).replace("▁", " ") for i in ids]
        text = "".join(pieces)
        found = (use_of(w, text) for w in words)
        spans = [m.span() for m in found if m]
        starts = [0, *accumulate(map(len, pieces))]
        return [
            ([i], answer * asked if any(first < end and last > begin for begin, end in spans) else answer)
            for i, first, last in zip(ids, starts, starts[1:], strict=False)
        ]

    def plain(self, text: str) -> list:
        return [self.text(text.strip()), ([vocab.ENDOFTEXT], 1.0)]

    # ----------------------------------------------------------------- stories

    def words_of(self, story: str, n: int, include: str | None = None) -> list[str]:
        found = sorted(set(re.findall(r"\b[a-z]+\b", story)) & self.askable - {include})
        words = self.rng.sample(found, min(n, len(found)))
        if include and words:
            words[self.rng.randrange(len(words))] = include
        return words

    def recast(self, story: str) -> tuple[str, str | None]:
        """The story with one animal or thing exchanged, so that only the request can tell which it is."""
        rng = self.rng
        for kind in rng.sample([ANIMALS, THINGS], 2):
            present = [w for w in kind if len(re.findall(rf"\b{w}s?\b", story, re.I)) >= 2]
            if not present:
                continue
            old, new = rng.choice(present), rng.choice(kind)
            story = re.sub(rf"\b([Aa])n? {old}\b", lambda m, new=new: m[1] + article(new)[1:], story)
            for a, b in ((old, new), (old.capitalize(), new.capitalize())):
                story = re.sub(rf"\b{a}(s?)\b", rf"{b}\1", story)
            return story, new
        return story, None

    def topic(self, story: str) -> str | None:
        """What the story is about, as a noun phrase: "a rabbit who finds a key"; None if nothing is found."""
        low = story.lower()
        who = Counter({w: len(re.findall(rf"\b{w}\b", low)) for w in ANIMALS + PEOPLE})
        hero, times = who.most_common(1)[0]
        if times < 2:
            return None
        actions = [(v, o) for v, o in A_ACTION.findall(story) if o in self.askable and o != hero]
        things = [w for w in THINGS if re.search(rf"\b{w}\b", low)]
        name = next((n for kind, n in NAMED.findall(story) if kind == hero), None)
        subject = article(hero) + (f" named {name}" if name and self.rng.random() < 0.3 else "")
        choice = self.rng.random()
        if actions and choice < 0.6:
            verb, thing = self.rng.choice(actions)
            return f"{subject} who {VERBS[verb]} {article(thing)}"
        if things and choice < 0.85:
            return f"{subject} and {article(self.rng.choice(things))}"
        return subject

    def request(self, story: str, include: str | None = None) -> str:
        """What one would ask to be told `story`, by its topic or by its words, of them `include`."""
        rng = self.rng
        topic = self.topic(story) if rng.random() < 0.4 else None
        if topic:
            form = rng.choice(["Write a story about {}.", "Write a story about {}.", "Tell me a story about {}.",
                               "Write a short story about {}.", "Can you tell me a story about {}?",
                               "Please write a little story about {}."])  # fmt: skip
            return form.format(topic)
        words = self.words_of(story, rng.choice([2, 3, 3, 4]), include)
        if rng.random() < 0.3:  # the order of the story, which is easier to follow
            words.sort(key=lambda w: story.lower().find(w))
        if len(words) < 2 or rng.random() < 0.04:
            return rng.choice(["Tell me a story.", "Write a short story.", "Write a story for a child."])
        joined = ", ".join(words) if rng.random() < 0.7 else ", ".join(words[:-1]) + " and " + words[-1]
        form = rng.choice(["Write a short story with the words: {}.", "Write a short story with the words: {}.",
                           "Write a story with the words: {}.", "Tell me a story that uses the words {}."])  # fmt: skip
        return form.format(joined)

    def story(self, chat: float = 0.7) -> list:
        story = self.rng.choice(self.stories).strip()
        if self.rng.random() > chat:
            return self.plain(story)
        story, new = self.recast(story) if self.rng.random() < 0.4 else (story, None)
        turns = [(self.request(story, new), story)]
        named = NAMED.search(story)
        if named and self.rng.random() < 0.25:
            turns.append((f"What is the name of the {named[1]}?", f"The name of the {named[1]} is {named[2]}."))
        return self.chat(*turns, asked=4.0)

    def fable(self) -> list:
        return self.plain(self.rng.choice(self.fables))

    # --------------------------------------------------------------- exercises

    def exercise(self) -> list:
        kinds = [self.sentence, self.secrets, self.repeat, self.replace, self.total, self.hello, self.ask_name]
        return self.rng.choices(kinds, [10, 7, 2, 2, 2, 0.5, 2])[0]()

    def sentence(self) -> list:
        turns = []
        for _ in range(self.rng.randint(1, 4)):
            if few := self.rng.random() < 0.4:
                text, new = self.recast(self.passage(5))
            else:
                text, new = self.rng.choice(self.sentences), None
            words = self.words_of(text, self.rng.choice([1, 2, 2, 3]), new)
            if words:
                form = "Write a few sentences with the words: {}." if few else "Write a sentence with the words: {}."
                turns.append((form.format(", ".join(words)), text))
        return self.chat(*turns, answer=1.5, asked=3.0)

    def facts(self, n: int) -> list[tuple[str, str, str]]:
        """`n` planted facts about different owners: (fact, question, answer)."""
        rng, made = self.rng, []
        for owner in rng.sample(ANIMALS + PEOPLE, n):
            if rng.random() < 0.7:
                word = rng.choice(THINGS + PLACES)
                fact = SECRET_ANSWERS.format(owner, word)
                made.append((fact, f"What is the secret word of the {owner}?", fact))
            else:
                fact = f"The {owner} hid the {rng.choice(THINGS)} in the {rng.choice(PLACES)}."
                thing = fact.split(" hid the ")[1].split(" in the ")[0]
                made.append((fact, f"Where did the {owner} hide the {thing}?", fact))
        return made

    def secrets(self, length: int = 0, n: int = 0) -> list:
        """Facts planted between the sentences of stories, then asked for; `length` in tokens (0: one story)."""
        rng = self.rng
        length = length or rng.choice([60, 120, 200, 300, 400])
        facts = self.facts(n or rng.randint(1, 4))
        # Asking for it again costs about 30 tokens a fact.
        room = length - 34 * len(facts) - 20 * len(facts)
        sentences: list[str] = []
        size = 0
        while size < room:
            for sentence in re.split(r"(?<=[.!?]) +", rng.choice(self.stories).replace("\n", " ").strip()):
                size += len(self.sp.encode(sentence))
                if size >= room:
                    break
                sentences.append(sentence)
        for fact, _, _ in facts:
            sentences.insert(rng.randint(0, len(sentences)), fact)
        text = " ".join(sentences)
        rng.shuffle(facts)
        turns = [
            (f"{text}\n{facts[0][1]}" if rng.random() < 0.5 else f"Read this text. {text}\n{facts[0][1]}", facts[0][2])
        ]
        turns += [(question, reply) for _, question, reply in facts[1:]]
        return self.chat(*turns, answer=4.0)

    def passage(self, most: int) -> str:
        story = re.split(r"(?<=[.!?]) +", self.rng.choice(self.stories).replace("\n", " ").strip())
        first = self.rng.randrange(len(story))
        return " ".join(story[first : first + self.rng.randint(1, most)])

    def repeat(self) -> list:
        text = self.passage(3)
        return self.chat((self.rng.choice(["Repeat this text: {}", "Copy this text: {}"]).format(text), text))

    def replace(self) -> list:
        text = self.passage(4)
        words = [w for w in set(re.findall(r"[A-Za-z]+", text)) if w.lower() in self.askable or w[0].isupper()]
        if not words:
            return self.repeat()
        old, new = self.rng.choice(words), self.rng.choice(THINGS)
        new = new.capitalize() if old[0].isupper() else new
        return self.chat((f"Replace {old} with {new}: {text}", re.sub(rf"\b{old}\b", new, text)))

    def total(self) -> list:
        turns = []
        for _ in range(4):
            a, b = self.rng.randint(0, 10), self.rng.randint(0, 10)
            if self.rng.random() < 0.5:
                turns.append((f"What is {a} + {b}?", f"{a} + {b} = {a + b}."))
            else:
                turns.append((f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}."))
        return self.chat(*turns, answer=2.0)

    def hello(self) -> list:
        greeting = self.rng.choice(["Hello", "Hello!", "Hi!", "Hi", "Good morning!"])
        asked = self.rng.choice(["Who are you?", "What can you do?", "What are you?"])
        hello = "Hello! Would you like to hear a story?"
        return self.chat(
            (greeting, hello), (asked, "I am a very small language model. I write little stories."), answer=2.0
        )

    def ask_name(self) -> list:
        found = [s for s in self.rng.sample(self.stories, 30) if NAMED.search(s) and len(s) < 1200]
        if not found:
            return self.hello()
        kind, name = NAMED.findall(found[0])[0]
        question = f"{found[0].strip()}\nWhat is the name of the {kind}?"
        return self.chat((question, f"The name of the {kind} is {name}."), answer=3.0)

    def long(self, length: int) -> list:
        return self.secrets(length=length, n=self.rng.randint(4, max(5, length // 160)))


def pack(documents, length: int, batch: int):
    """Endless (ids, weights) batches of (batch, length + 1); documents lie whole where they can.

    Of a small pool the longest document that still fits comes next; only when none fits is one cut.
    """
    pool: list[tuple[list[int], list[float]]] = []
    rows: list[tuple[list[int], list[float]]] = []
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            while len(pool) < 24:
                runs = next(documents)
                pool.append(([i for run, _ in runs for i in run], [w for run, w in runs for _ in run]))
            space = length + 1 - len(ids)
            fits = [d for d in pool if len(d[0]) <= space]
            doc = max(fits, key=lambda d: len(d[0])) if fits else pool[0]
            if len(ids) == 0:
                doc = pool[0]  # the oldest opens the row, so none waits for ever
            pool.remove(doc)
            ids += doc[0][:space]
            weights += doc[1][:space]
        rows.append((ids, weights))
        if len(rows) == batch:
            yield [r[0] for r in rows], [r[1] for r in rows]
            rows = []
