"""Messages become text through a chat template, and long texts are cut where it hurts least."""

import jinja2
import pytest

from bayesrm.data import Shortened, render, shorten
from bayesrm.errors import ArgumentError, DataError

HI = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
HELLO = [{"role": "assistant", "content": "Hello!"}]

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
COUNTING = "{{ messages | length }}" + CHATML
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


class Tokenizer:
    """Renders as transformers' tokenizers do."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        environment = jinja2.Environment()
        environment.globals["raise_exception"] = raise_exception
        template = environment.from_string(self.chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def test_strings_stay_as_they_are():
    assert render("a", "b", Tokenizer(CHATML)) == ("a", "b")


def test_template_is_cut_where_the_response_begins():
    prompt, response = render(HI, HELLO, Tokenizer(CHATML))
    assert prompt == "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    assert response == "Hello!<|end|>"


def test_string_and_messages_mix():
    wanted = ("<|user|>Hi<|end|><|assistant|>", "Hello!<|end|>")
    assert render("Hi", HELLO, Tokenizer(CHATML)) == wanted
    assert render(HI[1:], "Hello!", Tokenizer(CHATML)) == wanted
    assert render("", HELLO, Tokenizer(CHATML)) == ("", "<|assistant|>Hello!<|end|>")


def test_responses_of_several_turns():
    more = [*HELLO, {"role": "user", "content": "Bye"}]
    assert render(HI[1:], more, Tokenizer(CHATML))[1] == "Hello!<|end|><|user|>Bye<|end|>"


def test_generation_marker_that_a_finished_turn_lacks():
    prompt, response = render(HI[1:], HELLO, Tokenizer(THINKING))
    assert (prompt, response) == ("<|user|>Hi<|end|><|assistant|>", "Hello!<|end|>")


def test_template_that_does_not_continue_its_prompt():
    with pytest.raises(DataError, match="other than as its prompt and a continuation"):
        render(HI, HELLO, Tokenizer(COUNTING))


def test_template_that_refuses():
    with pytest.raises(DataError, match=r"refuses messages with the roles .*: no system role"):
        render(HI, HELLO, Tokenizer(STRICT))


def test_without_a_template_there_are_plain_lines():
    prompt, response = render(HI, HELLO, Tokenizer(None))
    assert prompt + response == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello!"
    assert prompt.endswith("Assistant:")
    more = [*HELLO, {"role": "user", "content": "Bye"}]
    assert render("Hi", more, Tokenizer(None)) == ("User: Hi\n\nAssistant:", " Hello!\n\nUser: Bye")


@pytest.mark.parametrize(
    ("max_length", "ids", "cut"),
    [
        (6, [1, 2, 3, 7, 8], Shortened.NONE),
        (5, [1, 2, 3, 7, 8], Shortened.NONE),
        (4, [2, 3, 7, 8], Shortened.PROMPT),
        (2, [7, 8], Shortened.PROMPT),
        (1, [7], Shortened.RESPONSE),
    ],
)
def test_shorten(max_length, ids, cut):
    assert shorten([1, 2, 3], [7, 8], max_length) == (ids, cut)


def test_shorten_refuses_no_room():
    with pytest.raises(ArgumentError, match="`max_length` is 0; give at least 1"):
        shorten([1], [2], 0)
