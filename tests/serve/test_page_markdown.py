"""What the chat page makes of markdown, in a real Chromium."""

import pytest

LINK = '<a href="{0}" target="_blank" rel="noopener noreferrer nofollow">{0}</a>'
SAMPLES = {
    "a *b* **c** `d` ~~e~~": "<p>a <em>b</em> <strong>c</strong> <code>d</code> <del>e</del></p>",
    "snake_case_name and 2*3*4": "<p>snake_case_name and 2<em>3</em>4</p>",
    "# One\ntwo": "<h3>One</h3><p>two</p>",
    "- a\n- b\n  - c\n\nd": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> b": "<blockquote><p>a\nb</p></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "<b>x</b> &amp;": "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>",
    r"\*a\* \# b": "<p>*a* # b</p>",
    "[x](javascript:y) [z](/etc)": "<p>x z</p>",
    "a  \nb": "<p>a<br>b</p>",
    "<https://a.b/c?d=(e)>, https://a.b.": (
        f"<p>{LINK.format('https://a.b/c?d=(e)')}, {LINK.format('https://a.b')}.</p>"
    ),
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
}
RENDER = """
const [texts, done] = arguments;
import('/page/markdown.js').then(({ show }) => {
  done(texts.map((text) => {
    const element = document.createElement('div'), began = performance.now();
    show(element, text);
    return [element.innerHTML, performance.now() - began];
  }));
});
"""


def test_markdown_becomes_the_elements_that_it_means(page):
    found = page.driver.execute_async_script(RENDER, list(SAMPLES))
    assert dict(zip(SAMPLES, [html for html, _ in found], strict=True)) == SAMPLES


def test_code_keeps_every_character_and_a_table_its_cells(page):
    code = "for i in range(3):\n\n    print('<b>', i)\n"
    (html, _), (table, _) = page.driver.execute_async_script(
        RENDER, [f"```python\n{code}```", "| a | b |\n|---|--:|\n| 1 | *2* |"]
    )
    assert f"<code>{code.replace('<', '&lt;').replace('>', '&gt;')[:-1]}</code>" in html
    assert '<th>a</th><th class="right">b</th>' in table
    assert '<td>1</td><td class="right"><em>2</em></td>' in table


@pytest.mark.parametrize(
    "unit", ["*", "[", "`", "_", "> ", "- ", "![](", "**a", "|", "\\", "1. ", "~~", "http://", " \n", "#"]
)
def test_odd_markdown_of_any_length_is_shown_soon(page, unit):
    ((_, milliseconds),) = page.driver.execute_async_script(RENDER, [unit * (40_000 // len(unit))])
    assert milliseconds < 2000


def test_a_text_that_grows_shows_what_the_whole_would(page):
    text = "\n\n".join(SAMPLES) + "\n\n```\ncode\n\nmore\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    script = """
    const [text, done] = arguments;
    import('/page/markdown.js').then(({ show }) => {
      const grown = document.createElement('div'), whole = document.createElement('div');
      for (let i = 0; i <= text.length; i += 3) show(grown, text.slice(0, i));
      show(grown, text);
      show(whole, text);
      done([grown.innerHTML, whole.innerHTML]);
    });
    """
    grown, whole = page.driver.execute_async_script(script, text)
    assert grown == whole
