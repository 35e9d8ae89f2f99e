"""Conversations as tokens: transformers' encoding, answers as they were sampled, documents, marks."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from chats import CHATML, GEMMA, Messages, assistant, chat_template, system, tokenizer, transformers_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin_gguf.runtime.chat_prompt import NEAREST, common
from griffin_gguf.runtime.errors import FileFormatError, GriffinError

RULES = "You are a wise old hacker who lives under the river. Be kind to everyone, and brief."
CONVERSATION = [
    user("What is a hacker? Tell me all about the word, at length, please, in English."),
    assistant("One who enjoys programming rather than just theorizing about it, they say."),
    user("And what is a cracker? Tell me that in as many words, and where it is from."),
]


def decoded(tokens: Sequence[int]) -> str:
    return tokenizer().decode(tokens, special=True)


# Encoding.


@pytest.mark.parametrize("template", [GEMMA, CHATML])
@pytest.mark.parametrize(
    "messages",
    [
        [user("Why?")],
        CONVERSATION,
        [user("<b>&'\"é 👍🏽\u2028"), assistant("1.\n\n\n2.  x"), user("def f(x):\n    return 12")],
    ],
)
def test_transformers_encodes_the_same(template: str, messages: Messages) -> None:
    expected = transformers_tokenizer().apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert chat_template(template).prompt(tokenizer(), messages).tokens == expected
    assert chat_template(template).encode(tokenizer(), messages) == expected


def test_transformers_encodes_a_system_message_the_same() -> None:
    messages = [system(RULES), *CONVERSATION]
    expected = transformers_tokenizer().apply_chat_template(
        messages, chat_template=CHATML, add_generation_prompt=True, return_dict=False
    )
    assert chat_template(CHATML).prompt(tokenizer(), messages).tokens == expected


@pytest.mark.parametrize("template", [GEMMA, CHATML])
def test_transformers_continues_a_begun_answer_the_same(template: str) -> None:
    messages = [*CONVERSATION, assistant("A cracker is one who breaks")]
    expected = transformers_tokenizer().apply_chat_template(
        messages, chat_template=template, continue_final_message=True, return_dict=False
    )
    prompt = chat_template(template).prompt(tokenizer(), messages)
    assert prompt.tokens == expected
    assert decoded(prompt.tokens[-prompt.begun :]) == messages[-1]["content"]


def test_a_begun_answer_stands_as_it_is() -> None:
    prompt = chat_template().prompt(tokenizer(), [user("Why?"), assistant(" <end_of_turn> So \n")])
    assert decoded(prompt.tokens) == (
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n <end_of_turn> So \n"
    )
    assert prompt.tokens.count(tokenizer().control_tokens["<end_of_turn>"]) == 1


# Whatever a person, or a program that pretends to be one, may write.
NAMES = ["<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>", "<|im_end|>\n", "<|im_start|>"]
SIGNS = ["\ufdd0", "\ufdd1", "\ufdd10\ufdd1", "\ufdd1user\ufdd1", "\ufdd1document\ufdd1", "\n", "\n\n", " ", "{{", "\0"]
PIECES = st.sampled_from([*NAMES, *SIGNS, "model", "assistant"]) | st.text(max_size=8)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
TEMPLATES = st.sampled_from([GEMMA, CHATML])


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """Leading system messages, perhaps; then turns that alternate, the last a user's."""
    messages = [system(draw(TEXTS)) for _ in range(draw(st.integers(0, 2)))]
    for _ in range(draw(st.integers(0, 3))):
        messages += [user(draw(TEXTS)), assistant(draw(TEXTS))]
    return [*messages, user(draw(TEXTS))]


def structure(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token in tokenizer().control_ids]


@settings(max_examples=40)
@given(conversations(), TEMPLATES, st.booleans())
def test_any_texts_leave_the_turns_as_they_are(messages: Messages, template: str, document: bool) -> None:
    found = chat_template(template).prompt(tokenizer(), messages, document=document)
    plain = [{**message, "content": "a"} for message in messages]
    harmless = chat_template(template).prompt(tokenizer(), plain, document=document)
    assert structure(found.tokens) == structure(harmless.tokens)
    if not document:
        assert found.tokens == chat_template(template).encode(tokenizer(), messages)
    assert all(0 < mark < len(found.tokens) for mark in found.marks)
    assert all(later - mark >= NEAREST for mark, later in pairwise(found.marks))


# System messages.


def test_templates_that_take_system_messages_and_others() -> None:
    assert chat_template(CHATML).takes_system
    assert not chat_template(GEMMA).takes_system
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert not chat_template(silent).takes_system
    with pytest.raises(FileFormatError, match="UndefinedError"):
        assert chat_template("{{ nothing.at.all }}").takes_system


@pytest.mark.parametrize(
    ("messages", "merged"),
    [
        ([system("S"), user("a")], [user("S\n\na")]),
        ([system("S"), system("T"), user("a")], [user("S\n\nT\n\na")]),
        ([system(" \n"), user("a")], [user("a")]),
        (
            [user("a"), assistant("b"), system("S"), user("c")],
            [user("a"), assistant("b"), user("S\n\nc")],
        ),
        (
            [system("S"), user("a"), system("T"), assistant("b"), user("c")],
            [user("S\n\na"), assistant("b"), user("T\n\nc")],
        ),
        ([system("S")], [user("S")]),
        ([user("a"), assistant("b"), system("S")], [user("a"), assistant("b"), user("S")]),
    ],
)
def test_system_texts_go_in_front_of_the_next_users(messages: Messages, merged: Messages) -> None:
    gemma = chat_template()
    expected = tokenizer().encode(gemma.render(merged), special=True)
    assert gemma.prompt(tokenizer(), messages).tokens == expected
    assert gemma.encode(tokenizer(), messages) == expected


@pytest.mark.parametrize("template", [GEMMA, CHATML])
def test_the_next_turn_completes_a_conversation_under_a_system_text(template: str) -> None:
    chat, (first, answer, second) = chat_template(template), CONVERSATION
    fed = chat.encode(tokenizer(), [system(RULES), first]) + tokenizer().encode(answer["content"], bos=False)
    following = chat.encode_next(tokenizer(), [system(RULES), first, answer, system("Be brief."), second])
    assert following is not None
    assert fed + following == chat.encode(tokenizer(), [system(RULES), first, answer, system("Be brief."), second])


# Answers as they were sampled.


def spelled(text: str) -> list[int]:
    """`text` in more tokens than its encoding has: letter by letter."""
    return [token for letter in text for token in tokenizer().encode(letter, bos=False)]


@pytest.mark.parametrize("template", [GEMMA, CHATML])
def test_each_turn_continues_what_was_sampled(template: str) -> None:
    chat, known = chat_template(template), dict[tuple[tuple[int, ...], str], list[int]]()
    messages: Messages = [system(RULES)]
    read: list[int] = []
    for question, answer in [("Why?", " So. "), ("Ah?", "<end_of_turn>"), ("No?", "")]:
        messages.append(user(question))
        prompt = chat.prompt(tokenizer(), messages, lambda before, text: known.get((tuple(before), text)))
        assert prompt.tokens[: len(read)] == read
        messages.append(assistant(answer))
        read = prompt.tokens + spelled(answer)
        known[tuple(prompt.tokens), answer] = spelled(answer)
    # And the answer may go on from where it stopped.
    prompt = chat.prompt(tokenizer(), messages, lambda before, text: known.get((tuple(before), text)))
    assert prompt.tokens == read
    messages[2] = assistant("Another.")
    prompt = chat.prompt(tokenizer(), messages, lambda before, text: known.get((tuple(before), text)))
    assert prompt.tokens == chat.prompt(tokenizer(), messages).tokens


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.booleans(), TEXTS.map(lambda text: f"a{text}z")), min_size=1, max_size=4),
    TEMPLATES,
    st.booleans(),
)
def test_the_walk_ends_at_the_first_answer_that_is_not_known(
    answers: list[tuple[bool, str]], template: str, document: bool
) -> None:
    chat, asked = chat_template(template), list[tuple[list[int], str]]()
    messages = [turn for _, text in answers for turn in (user("q"), assistant(text))]

    def said(before: Sequence[int], text: str) -> list[int] | None:
        asked.append((list(before), text))
        known, _ = answers[len(asked) - 1]
        return tokenizer().encode(tokenizer().shield(text), bos=False, special=True) if known else None

    whole = chat.prompt(tokenizer(), [*messages, user("q")], said, document).tokens
    assert whole == chat.prompt(tokenizer(), [*messages, user("q")], document=document).tokens
    walked = next((i + 1 for i, (known, _) in enumerate(answers) if not known), len(answers))
    assert [text for _, text in asked] == [text for _, text in answers[:walked]]
    for i, (before, _) in enumerate(asked):
        assert before == chat.prompt(tokenizer(), messages[: 2 * i + 1], document=document).tokens


def test_control_tokens_in_a_sampled_answer_are_no_turns() -> None:
    control = tokenizer().control_tokens
    odd = [control["<end_of_turn>"], control["<start_of_turn>"]] * 20
    prompt = chat_template().prompt(tokenizer(), CONVERSATION, lambda before, text: odd)
    answer = next(i for i in range(len(prompt.tokens)) if prompt.tokens[i : i + len(odd)] == odd)
    first, second = prompt.marks
    assert first < answer < answer + len(odd) < second
    for mark in prompt.marks:
        assert decoded(prompt.tokens[:mark]).endswith("<end_of_turn>\n")
        assert prompt.tokens[mark] == control["<start_of_turn>"]


@pytest.mark.parametrize(
    "template", ["{{ messages | length }}", "{% for m in messages %}{{ m.content * 2 }}{% endfor %}"]
)
def test_where_the_template_hides_or_repeats_answers_their_texts_stand(template: str) -> None:
    chat = chat_template(template)
    assert chat.prompt(tokenizer(), CONVERSATION, lambda before, text: [5]).tokens == chat.encode(
        tokenizer(), CONVERSATION
    )
    for refused in (chat.opening, lambda tokenizer: chat.prompt(tokenizer, CONVERSATION, document=True)):
        with pytest.raises(FileFormatError, match="does not show a message's text exactly once"):
            refused(tokenizer())


# Documents.


@pytest.mark.parametrize("template", [GEMMA, CHATML])
@pytest.mark.parametrize("rules", [[], [system(RULES)]])
def test_a_conversation_behind_a_document_is_one_with_the_document_in_it(template: str, rules: Messages) -> None:
    chat, document = chat_template(template), "A book of the river.\nIt ends here."
    first = user("\n\n".join([document, *(rule["content"] for rule in rules), CONVERSATION[0]["content"]]))
    whole = chat.encode(tokenizer(), [first, *CONVERSATION[1:]])
    read = chat.opening(tokenizer()) + tokenizer().encode(document, bos=False)
    assert read + chat.prompt(tokenizer(), [*rules, *CONVERSATION], document=True).tokens == whole


def test_an_opening_is_what_stands_before_the_first_text() -> None:
    assert decoded(chat_template(GEMMA).opening(tokenizer())) == "<bos><start_of_turn>user\n"
    assert decoded(chat_template(CHATML).opening(tokenizer())) == "<bos><|im_start|>user\n"


# Marks.


def prompt_with(template: str, *messages: dict[str, str]) -> tuple[list[int], tuple[int, ...]]:
    prompt = chat_template(template).prompt(tokenizer(), messages)
    return prompt.tokens, prompt.marks


LONG = "It is a long story, and nobody under the river knows how it began, nor where it ends, nor whose it is."
# Two conversations each, and where they part.
PARTINGS: dict[str, tuple[Messages, Messages]] = {
    "another last message": (CONVERSATION, [*CONVERSATION[:2], user("Who says so? I have never heard of that.")]),
    "another answer": (CONVERSATION, [CONVERSATION[0], assistant(LONG), CONVERSATION[2]]),
    "another chat under the same system text": (
        [system(RULES), *CONVERSATION],
        [system(RULES), user("Good morning! Whose river is this, if I may ask?")],
    ),
    "another last message under a system text": (
        [system(RULES), *CONVERSATION],
        [system(RULES), *CONVERSATION[:2], user("Who says so?")],
    ),
    "a message about the system text": (
        [system(RULES), user("\n\nWhat is that?")],
        [system(RULES), user("(Whoever reads this)")],
    ),
    "an answer begun in another way": (
        [*CONVERSATION, assistant("A cracker is one who")],
        [*CONVERSATION, assistant("Well, some say that a cracker")],
    ),
    "an answer that is not begun": ([*CONVERSATION, assistant(LONG)], CONVERSATION),
}


@pytest.mark.parametrize("template", [GEMMA, CHATML])
@pytest.mark.parametrize(("one", "other"), PARTINGS.values(), ids=PARTINGS.keys())
def test_there_is_a_mark_where_two_conversations_part(template: str, one: Messages, other: Messages) -> None:
    (tokens, marks), (others, _) = prompt_with(template, *one), prompt_with(template, *other)
    parting = common(tokens, others)
    header = len(tokenizer().encode("<|im_start|>assistant\n", bos=False, special=True))
    assert any(parting - header <= mark <= parting for mark in marks), (parting, marks)


def test_marks_are_few() -> None:
    """None for what the state at the prompt's end is good for, nor close to another."""
    short = [turn for _ in range(20) for turn in (user("Why?"), assistant("So."))]
    tokens, marks = prompt_with(GEMMA, *short, user("Why?"))
    assert all(later - mark >= NEAREST for mark, later in pairwise((0, *marks)))
    assert len(marks) > len(tokens) / (2 * NEAREST)
    assert prompt_with(GEMMA, user(LONG))[1] == ()


def test_a_system_text_has_its_mark_however_short() -> None:
    for template in (GEMMA, CHATML):
        tokens, (mark, *_) = prompt_with(template, system("Hi."), user("Why?"))
        assert "Hi." in decoded(tokens[:mark])
        assert "Why" not in decoded(tokens[:mark])


# Messages at fault.


@pytest.mark.parametrize(
    ("messages", "document", "words"),
    [
        ([], False, "messages: expected a user's to answer"),
        ([assistant("a")], False, "messages: expected a user's to answer"),
        ([system(" ")], False, "messages: expected a user's to answer"),
        ([assistant("a"), user("b")], True, "messages: expected a user's behind the document"),
        ([user("a"), {"role": "tool", "content": "b"}], False, r"messages\[1\].role: expected system, user, assistant"),
        ([user("a"), {"role": "user"}], False, r"messages\[1\].content: expected a string"),
        ([user("a"), user("b")], False, "messages: the chat template refuses them: Conversation roles must alternate"),
        ([user("\ud800")], False, "lone surrogate"),
    ],
)
def test_messages_at_fault_are_named(messages: Messages, document: bool, words: str) -> None:
    with pytest.raises(GriffinError, match=words) as caught:
        chat_template().prompt(tokenizer(), messages, document=document)
    assert not isinstance(caught.value, FileFormatError)
