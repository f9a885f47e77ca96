import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raymoe.training.data.chat import ChatRenderer
from raymoe.training.data.encode import ChatEncoder, PairEncoder
from raymoe.training.data.examples import Conversation, Pair, conversation
from raymoe.training.data.files import Row
from raymoe.training.tokenizer import PLAIN_CHAT_TEMPLATE, train_tokenizer

# As released templates mostly are: no generation marks; the form of ChatML
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Like those that write the end of text after the last answer only
ONLY_LAST_ENDS = (
    "{%- for message in messages -%}"
    "{{ '[' ~ message.role ~ ']' ~ message.content }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant]' }}{%- else -%}{{ eos_token }}{%- endif -%}"
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A caf\u00e9 \U0001f600 robot."},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "No"},
]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["Hello, who are you? A robot. Be brief. assistant user system"] * 3, 400)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def counted(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[str]:
    """The runs of tokens that are learnt, as text."""
    ids, counts = ChatRenderer(tokenizer)(Conversation("c", messages))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    runs: list[list[int]] = [[]]
    for token, count in zip(ids, counts, strict=True):
        if count:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (None, ["<|endoftext|>"] * 2),
        (PLAIN_CHAT_TEMPLATE, ["<|endoftext|>"] * 2),
        (CHATML, ["<|im_end|>\n"] * 2),
        (ONLY_LAST_ENDS, ["", "<|endoftext|>"]),
    ],
    ids=["ours", "plain", "chatml", "only_last_ends"],
)
def test_the_assistants_turns_and_their_ends_are_learnt(template, ends):
    answers = [message["content"] for message in MESSAGES if message["role"] == "assistant"]
    expected = [answer + end for answer, end in zip(answers, ends, strict=True)]
    assert counted(tokenizer_with(template), MESSAGES) == expected


@given(contents=st.lists(st.text("ab .\n\u00e9", min_size=1, max_size=8), min_size=2, max_size=6))
@settings(deadline=None, max_examples=30)
def test_prefixes_and_generation_marks_agree(contents):
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    marked = CHATML.replace(
        "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}",
        "{{ '<|im_start|>' ~ message.role ~ '\n' }}{%- if message.role == 'assistant' -%}{%- generation -%}"
        "{{ message.content ~ '<|im_end|>\n' }}{%- endgeneration -%}"
        "{%- else -%}{{ message.content ~ '<|im_end|>\n' }}{%- endif -%}",
    )
    assert "{%- generation -%}" in marked
    conversation = Conversation("c", messages)
    assert ChatRenderer(_TOKENIZERS[0])(conversation) == ChatRenderer(_marked_tokenizer(marked))(conversation)


_TOKENIZERS = [tokenizer_with(CHATML)]


def _marked_tokenizer(template: str) -> PreTrainedTokenizerFast:
    if len(_TOKENIZERS) == 1:
        _TOKENIZERS.append(tokenizer_with(template))
    return _TOKENIZERS[1]


def test_eos_separates_conversations_and_is_not_doubled():
    for template, is_learnt in ((ONLY_LAST_ENDS, True), (CHATML, False)):
        tokenizer = tokenizer_with(template)
        encoded = ChatEncoder(ChatRenderer(tokenizer), 0)([Conversation("a", MESSAGES), Conversation("b", MESSAGES)])
        assert (encoded.tokens == 0).sum() == 2
        assert encoded.tokens[-1] == 0
        assert encoded.counts is not None
        assert bool(encoded.counts[-1]) == is_learnt
        assert encoded.num_bytes == 2 * len("A caf\u00e9 \U0001f600 robot.No".encode())


def test_a_tokenizer_without_template_is_refused():
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"chat template, and the tokenizer has none.*tokenizer\.chat_template: plain"):
        ChatRenderer(tokenizer)


def test_what_the_template_refuses_is_named():
    renderer = ChatRenderer(tokenizer_with(None))
    with pytest.raises(ValueError, match=r"rows\.jsonl:7: the chat template refuses it: unknown role wizard"):
        renderer(Conversation("rows.jsonl:7", [{"role": "wizard", "content": "a"}, *MESSAGES]))


def test_a_template_that_drops_the_answer_is_refused():
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    renderer = ChatRenderer(tokenizer_with(template))
    with pytest.raises(ValueError, match="rows:1: the chat template leaves nothing of the assistant's turns"):
        renderer(Conversation("rows:1", MESSAGES))


def row(value: object) -> Row:
    return Row("r.jsonl:2", "/d/r.jsonl line 2", "field", {"messages": value})


def test_parts_and_nulls_are_read():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "c"},
    ]
    read = conversation(row(messages), "messages")
    assert read.messages[0] == {"role": "user", "content": parts}
    assert (read.text, read.counted_text) == ("ab\n\nc\n", "c")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "expected a list of messages {role, content}, got str"),
        ([], "got an empty list"),
        ([{"content": "a"}], "message 1: expected an object with 'role' and 'content', got dict"),
        ([{"role": "user", "content": 3}], "message 1: content must be a string or a list of text parts, got int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: only text content can be trained on"),
        ([{"role": "user", "content": "\ud800"}], "message 1: lone surrogate at character 0"),
        ([{"role": "user", "content": "a"}], "no message of role 'assistant', so there is nothing to learn"),
    ],
    ids=["string", "empty", "role", "number", "image", "surrogate", "no answer"],
)
def test_bad_messages_name_file_line_and_message(value, message):
    with pytest.raises(ValueError, match=r"/d/r\.jsonl line 2, field 'messages'") as error:
        conversation(row(value), "messages")
    assert message in str(error.value)


@given(
    pairs=st.lists(
        st.tuples(st.text("ab .\u00e9<|>", max_size=9), st.text("ab .\u00e9<|>", min_size=1, max_size=9)), max_size=4
    )
)
@settings(deadline=None)
def test_completions_and_their_eos_are_learnt(pairs):
    tokenizer = _TOKENIZERS[0]
    encoder = PairEncoder(tokenizer.backend_tokenizer.to_str(), 0)
    encoded = encoder([Pair(str(i), prompt, completion) for i, (prompt, completion) in enumerate(pairs)])
    assert encoded.counts is not None
    assert tokenizer.decode(encoded.tokens.tolist()) == "".join(p + c + "<|endoftext|>" for p, c in pairs)
    start = 0
    for prompt, completion in pairs:
        end = start + encoded.tokens[start:].tolist().index(0) + 1
        learnt = encoded.counts[start:end]
        assert learnt[-1]
        # learnt is a suffix of the completion, short of it by no more than one token over the seam
        first = int(learnt.argmax())
        assert learnt[first:].all()
        spelt = tokenizer.decode(encoded.tokens[start + first : end].tolist())
        assert (completion + "<|endoftext|>").endswith(spelt)
        prefix = encoded.tokens[start : start + max(first - 1, 0)].tolist()
        assert prompt.startswith(tokenizer.decode(prefix).rstrip("\ufffd"))
        start = end
    assert encoded.num_bytes == sum(len(c.encode()) for _, c in pairs)
