"""Jinja code that wraps a model's chat template.

BEFORE turns a client's messages into those of training, with a mark in each span's place. The
model's own template renders them. AFTER replaces the marks by the new tokens, and refuses a text
that holds the tokens' tag anywhere else.

It must run in the Jinja of `transformers` and of llama.cpp. `chat_template` sets the variables it
needs: embedgrad_tag, embedgrad_end, embedgrad_prompts (a mapping from names, see
`_prompt_constants` there), embedgrad_default, embedgrad_names, embedgrad_system.
"""

from __future__ import annotations

# A namespace, because plain variables set in a loop end with it; and a copy of a message's content,
# because vLLM takes a loop over `message.content` as a request for lists of parts.
BEFORE = """
{%- set embedgrad = namespace(name=embedgrad_default, messages=[], built=[], last=-1, query="",
    client=none, role="system", content=none, text="", opened=false, tags=0, expected=0,
    odd=-1) -%}

{#- Every content as one text that does not hold the tag. -#}
{%- for message in messages -%}
    {%- set embedgrad.content = message.content -%}
    {%- set embedgrad.text = "" -%}
    {%- if embedgrad.content is string -%}
        {%- set embedgrad.text = message.content -%}
    {%- elif message.content is defined and message.content is not none -%}
        {%- for part in embedgrad.content -%}
            {%- if not (part.text is defined and part.text is string) -%}
                {{- raise_exception("embedgrad: this prompt takes text only") -}}
            {%- endif -%}
            {%- set embedgrad.text = embedgrad.text ~ ("" if loop.first else "\\n") ~ part.text -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set embedgrad.text = embedgrad.text | replace(embedgrad_tag, " ") -%}
    {%- if loop.first and (message.role == "system" or message.role == "developer") -%}
        {%- set embedgrad.client = embedgrad.text -%}
        {%- set embedgrad.role = message.role -%}
    {%- else -%}
        {%- if message.role == "user" -%}
            {%- set embedgrad.last = embedgrad.messages | length -%}
            {%- set embedgrad.query = embedgrad.text -%}
        {%- endif -%}
        {%- if message.content is not defined or message.content is none -%}
            {%- set embedgrad.messages = embedgrad.messages + [message] -%}
        {%- elif embedgrad.content is string and message.content == embedgrad.text -%}
            {%- set embedgrad.messages = embedgrad.messages + [message] -%}
        {%- else -%}
            {%- set embedgrad.messages =
                embedgrad.messages + [dict(message, content=embedgrad.text)] -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}

{#- Which prompt: a variable, else a marker in the system message, else the first. -#}
{%- if embedgrad.client is string and "<<prompt:" in embedgrad.client -%}
    {%- set embedgrad_pieces = embedgrad.client.split("<<prompt:") -%}
    {%- set embedgrad_ends = embedgrad_pieces[1].split(">>") -%}
    {%- if embedgrad_pieces | length != 2 or embedgrad_ends | length < 2 -%}
        {{- raise_exception("embedgrad: expected one <<prompt:NAME>> in the system message") -}}
    {%- endif -%}
    {%- set embedgrad.name = embedgrad_ends[0] -%}
    {%- set embedgrad.text = embedgrad_pieces[0] ~ (embedgrad_ends[1:] | join(">>")) -%}
    {%- set embedgrad.client = embedgrad.text | trim | replace(embedgrad_tag, " ") -%}
    {%- if embedgrad.client == "" -%}{%- set embedgrad.client = none -%}{%- endif -%}
{%- endif -%}
{%- if prompt is defined and prompt -%}{%- set embedgrad.name = prompt -%}{%- endif -%}
{%- if embedgrad.name not in embedgrad_prompts -%}
    {{- raise_exception("embedgrad: no prompt is called '" ~ embedgrad.name ~ "'; known: "
        ~ embedgrad_names) -}}
{%- endif -%}
{%- set embedgrad_prompt = embedgrad_prompts[embedgrad.name] -%}

{#- The messages of training, with the client's last user message in its place. -#}
{%- if embedgrad.client is string and embedgrad_system == "refuse" -%}
    {{- raise_exception("embedgrad: this prompt takes no system message; leave it out") -}}
{%- endif -%}
{%- if embedgrad_prompt.system is string -%}
    {%- set embedgrad.text = embedgrad_prompt.system -%}
    {%- if embedgrad.client is string and embedgrad.client != "" -%}
        {%- set embedgrad.text = embedgrad.text ~ "\\n\\n" ~ embedgrad.client -%}
    {%- endif -%}
    {%- set embedgrad.built = [{"role": "system", "content": embedgrad.text}] -%}
{%- elif embedgrad.client is string -%}
    {%- set embedgrad.built = [{"role": embedgrad.role, "content": embedgrad.client}] -%}
{%- endif -%}
{%- set embedgrad.built = embedgrad.built + embedgrad_prompt.leading -%}
{%- for message in embedgrad.messages -%}
    {%- if loop.index0 == embedgrad.last -%}
        {%- set embedgrad.text =
            embedgrad_prompt.before ~ embedgrad.query ~ embedgrad_prompt.after -%}
        {%- set embedgrad.built = embedgrad.built + [dict(message, content=embedgrad.text)]
            + embedgrad_prompt.following -%}
    {%- else -%}
        {%- set embedgrad.built = embedgrad.built + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- if embedgrad_prompt.opening is string and add_generation_prompt is defined
        and add_generation_prompt -%}
    {%- set embedgrad.opened = true -%}
    {%- set embedgrad.built = embedgrad.built
        + [{"role": "assistant", "content": embedgrad_prompt.opening ~ embedgrad_end}] -%}
    {%- set add_generation_prompt = false -%}
{%- endif -%}
{%- set messages = embedgrad.built -%}
"""

# `embedgrad_text` is what the model's own template rendered.
AFTER = """
{%- if embedgrad.opened -%}
    {%- set embedgrad_pieces = embedgrad_text.split(embedgrad_end) -%}
    {%- if embedgrad_pieces | length != 2 -%}
        {{- raise_exception("embedgrad: the chat template does not show the answer's opening once")
        -}}
    {%- endif -%}
    {%- set embedgrad_text = embedgrad_pieces[0] -%}
{%- endif -%}
{#- Every span's mark becomes its tokens, which hold fixed text that training drew into them. -#}
{%- set embedgrad.tags = embedgrad_text.split(embedgrad_tag) | length -%}
{%- set embedgrad.text = embedgrad_text -%}
{%- for span in embedgrad_prompt.spans -%}
    {%- set embedgrad_pieces = embedgrad.text | replace(span.left ~ span.mark, span.mark)
        | replace(span.mark ~ span.right, span.mark) -%}
    {%- set embedgrad_pieces = embedgrad_pieces.split(span.mark) -%}
    {%- set embedgrad.tags = embedgrad.tags - (embedgrad_pieces | length) + 1 -%}
    {%- set embedgrad.expected = 0 if span.in_opening and not embedgrad.opened else 1 -%}
    {%- if embedgrad_pieces | length != embedgrad.expected + 1 -%}
        {%- set embedgrad.odd = (embedgrad_pieces | length) - 1 -%}
    {%- endif -%}
    {%- set embedgrad.text = embedgrad_pieces | join(span.tokens) -%}
{%- endfor -%}
{%- if embedgrad.tags != 1 -%}
    {{- raise_exception("embedgrad: the request contains text that belongs to refined tokens") -}}
{%- endif -%}
{%- if embedgrad_prompt.in_turn and embedgrad.last == -1 -%}
    {{- raise_exception("embedgrad: this prompt answers a user message; send one") -}}
{%- endif -%}
{%- if embedgrad.odd != -1 -%}
    {{- raise_exception("embedgrad: the chat template shows the prompt " ~ embedgrad.odd
        ~ " times") -}}
{%- endif -%}
{{- embedgrad.text -}}
"""
