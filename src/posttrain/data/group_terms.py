"""Words that name groups of people, for the table of labels that go together with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

GroupTerms = Mapping[str, Sequence[str]]

GROUP_TERMS: dict[str, dict[str, list[str]]] = {
    "en": {
        "women": "woman women girl girls she her hers herself mother mothers wife wives daughter daughters sister "
        "sisters lady ladies actress actresses female females mrs ms".split(),
        "men": "man men boy boys he him his himself father fathers husband husbands son sons brother brothers "
        "gentleman gentlemen actor actors male males mr".split(),
        "old people": ["elderly", "old man", "old men", "old woman", "old women", "old people", "senior citizen"]
        + ["senior citizens", "pensioner", "pensioners", "grandmother", "grandfather", "grandparents"],
        "young people": "teenager teenagers teen teens youth youths adolescent adolescents kid kids child "
        "children".split(),
        "Black people": ["black man", "black men", "black woman", "black women", "black people", "african american"]
        + ["african americans", "african", "africans", "black actor", "black actors"],
        "white people": ["white man", "white men", "white woman", "white women", "white people", "caucasian"]
        + ["caucasians", "white actor", "white actors"],
        "Asians": "asian asians chinese japanese korean koreans indian indians vietnamese thai filipino "
        "filipinos".split(),
        "Latin Americans": "latino latina latinos latinas hispanic hispanics mexican mexicans cuban cubans brazilian "
        "brazilians".split(),
        "Arabs": "arab arabs arabic egyptian egyptians iraqi iraqis syrian syrians saudi saudis".split(),
        "Christians": "christian christians catholic catholics protestant protestants".split(),
        "Jews": "jew jews jewish judaism".split(),
        "Muslims": "muslim muslims islamic islam".split(),
        "Hindus": "hindu hindus hinduism".split(),
        "gay people": "gay gays lesbian lesbians homosexual homosexuals bisexual bisexuals queer".split(),
        "trans people": ["transgender", "transsexual", "trans man", "trans men", "trans woman", "trans women"],
        "disabled people": "disabled disability disabilities blind deaf wheelchair autistic handicapped".split(),
        "immigrants": "immigrant immigrants migrant migrants refugee refugees foreigner foreigners".split(),
        "poor people": ["poor people", "homeless", "working class", "beggar", "beggars"],
    },
    "de": {
        "women": "frau frauen mädchen mutter mütter ehefrau tochter töchter schwester schwestern "
        "dame damen schauspielerin weiblich weibliche".split(),
        "men": "mann männer er ihm ihn vater väter ehemann sohn söhne bruder brüder herr "
        "herren schauspieler männlich männliche".split(),
        "old people": "rentner rentnerin senior senioren seniorin großmutter großvater großeltern".split(),
        "young people": "jugendliche jugendlicher jugendlichen kind kinder teenager".split(),
        "Christians": "christ christen christin katholik katholiken katholisch evangelisch protestant".split(),
        "Jews": "jude juden jüdin jüdisch jüdische jüdischen".split(),
        "Muslims": "muslim muslime muslimin muslimisch islam islamisch".split(),
        "gay people": "schwul schwule schwuler lesbisch lesbe lesben homosexuell homosexuelle".split(),
        "disabled people": "behindert behinderte behinderung blind taub gehörlos rollstuhl".split(),
        "immigrants": "einwanderer migrant migranten migrantin flüchtling flüchtlinge ausländer ausländerin".split(),
    },
}
"""Group -> words and runs of words, in lower case, by language. A task's own list replaces that of its language.

No word that often means something else: German "sie" is they and you too, "sein" to be, "junge" young."""


def terms_of(language: str, own: GroupTerms | None = None) -> GroupTerms:
    """Return a task's own terms, or else those of its language; {}: there are none."""
    code = language.replace("_", "-").partition("-")[0].lower()
    return own if own is not None else GROUP_TERMS.get({"english": "en", "german": "de"}.get(code, code), {})
