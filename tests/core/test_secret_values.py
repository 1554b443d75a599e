"""Which values of a run's environment are secrets: by their names, and by what they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core import secret_values
from dstack_core.integration import Masker, is_secret_name


def _words(text: str) -> list[str]:
    return text.split()


# As tools of machine learning, clouds and databases document them.
SECRET_NAMES = _words("""
HF_TOKEN HUGGINGFACE_HUB_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY GITHUB_PAT GITHUB_TOKEN GH_TOKEN
GITLAB_TOKEN SSH_KEY SSH_PRIVATE_KEY PGPASSWORD DB_PASS DB_PASSWORD DB_PWD MYSQL_ROOT_PASSWORD MYSQL_PWD
REDIS_PASSWORD NGC_CLI_API_KEY NGC_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
AZURE_CLIENT_SECRET AZURE_STORAGE_KEY AZURE_STORAGE_CONNECTION_STRING AZURE_STORAGE_SAS_TOKEN
GOOGLE_APPLICATION_CREDENTIALS GOOGLE_API_KEY OPENAI_API_KEY ANTHROPIC_API_KEY MISTRAL_API_KEY
COMET_API_KEY NEPTUNE_API_TOKEN CLEARML_API_SECRET_KEY MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN
KAGGLE_KEY DATABRICKS_TOKEN SNOWFLAKE_PASSWORD SNOWFLAKE_PRIVATE_KEY_PASSPHRASE LABEL_STUDIO_API_KEY
DOCKER_PASSWORD DOCKER_AUTH_CONFIG NPM_TOKEN PYPI_API_TOKEN SENTRY_DSN SLACK_WEBHOOK_URL SLACK_BOT_TOKEN
MINIO_SECRET_KEY S3_SECRET JWT_SECRET DJANGO_SECRET_KEY ENCRYPTION_KEY FERNET_KEY PREFECT_API_KEY
PREFECT_API_AUTH_STRING REPLICATE_API_TOKEN TOGETHER_API_KEY RUNPOD_API_KEY VAULT_TOKEN
apiKey dbPassword hfToken AWSSecretKey client-secret my.private.key APIKEY HFTOKEN Passphrase
OPENAI_API_KEYS API_KEY_2 TOKEN_GITHUB BASIC_AUTH
""")
# As above, and what a sweep sets.
OTHER_NAMES = _words("""
STAGE EPOCHS MODEL MAX_TOKENS MAX_NEW_TOKENS MIN_TOKENS NUM_KEYS TOKENIZER TOKENIZER_PATH
TOKENIZERS_PARALLELISM KEYBOARD KEYCLOAK_URL MONKEY TURKEY HOTKEY AUTHOR AUTHORS SECRETARY COMPASS BYPASS
PASS_RATE NUM_PASSES PATH PATIENCE PWD OLDPWD HOME PYTHONPATH EOS_TOKEN PAD_TOKEN BOS_TOKEN_ID MASK_TOKEN
TOKEN_COUNT TOKEN_LIMIT TOKENS_PER_SECOND TOKEN_MIXER KEY_FILE SSH_KEY_PATH PASSWORD_FILE
AWS_WEB_IDENTITY_TOKEN_FILE SECRET_NAME AUTH_TYPE AUTH_URL OAUTH_CLIENT_ID PUBLIC_KEY SSH_PUBLIC_KEY
PRIMARY_KEY PARTITION_KEY SORT_KEY KEY_COLUMN LEARNING_RATE BATCH_SIZE SEED WANDB_PROJECT WANDB_MODE
HF_HOME HF_DATASETS_CACHE CUDA_VISIBLE_DEVICES NCCL_DEBUG OMP_NUM_THREADS AWS_REGION AWS_DEFAULT_REGION
DATASET RUN_NAME PRIVATE_REPO DATABASE_URL REDIS_URL S3_ENDPOINT MLFLOW_TRACKING_URI GITHUB_SHA
maxTokens tokenizerName keyboardLayout
""")


def test_the_tables_are_long_enough() -> None:
    assert len(SECRET_NAMES) >= 60
    assert len(OTHER_NAMES) >= 60


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_the_value_of_a_secret_name_is_masked(name: str) -> None:
    for form in (name, name.lower(), name.replace("_", "-")):
        if form != name and not name.isupper():
            continue
        assert list(secret_values({form: "swordfish"})) == ["swordfish"], form
        assert list(secret_values({form: "swordfish"}, mask_env="none")) == []


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_the_value_of_any_other_name_stays_readable(name: str) -> None:
    for form in (name, name.lower(), name.replace("_", "-")):
        if form != name and not name.replace("_", "").isupper():
            continue
        assert list(secret_values({form: "swordfish"})) == [], form
        assert list(secret_values({form: "swordfish"}, mask_env="all")) == ["swordfish"]
        assert list(secret_values({form: "swordfish"}, mask_env=[name.lower()])) == (
            ["swordfish"] if form.casefold() == name.casefold() else []
        )


@pytest.mark.parametrize(
    "value",
    [None, "", "main", "12345", "1234567", "-0.00001", "1e-10", "false", "FALSE", "${{ secrets.hf_token }}"],
)
def test_a_common_value_stays_readable_whatever_its_name(value: str | None) -> None:
    assert list(secret_values({"API_TOKEN": value})) == []
    assert list(secret_values({"API_TOKEN": value}, mask_env="all")) == []


@pytest.mark.parametrize("value", ["hunter22", "12345a", "truest", "-----BEGIN\nKEY-----", "20240917"])
def test_a_value_that_can_be_a_secret_is_one_by_its_name(value: str) -> None:
    assert list(secret_values({"DB_PASS": value})) == [value]


@pytest.mark.parametrize("value", ["basic", "Bearer", "disabled", "oauth2", "password"])
def test_a_way_to_log_in_stays_readable(value: str) -> None:
    assert list(secret_values({"API_AUTH": value})) == []


def test_a_long_number_is_a_secret_only_by_its_name() -> None:
    assert list(secret_values({"STEPS": "100000000"}, mask_env="all")) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("postgres://anna:s3cr3tpw@db:5432/x", "postgres:***db:5432/x"),
        ("redis://:s3cr3tpw@cache/0", "redis:***cache/0"),
        ("postgres://anna:pw@db/x", "postgres:***db/x"),
        ("postgres://postgres:postgres@postgres/x", "postgres:***postgres/x"),
        ("mongodb://a:p%40ssword@one,b:otherpass@two", None),
        ("https://ghp_0123456789abcdef@github.com/x/y", "https://***@github.com/x/y"),
        (
            "Server=db;User=anna;Password=s3cr3tpw;Encrypt=true",
            "Server=db;User=anna;Password=***;Encrypt=true",
        ),
        ("--epochs=10000 --hf-token=hf_abcdef --model=llama", "--epochs=10000 --hf-token=*** --model=llama"),
        ("https://store/x?size=10000&sig_token='abc def'", "https://store/x?size=10000&sig_token='***'"),
        ("https://anna@gitlab.example.com/x", "https://anna@gitlab.example.com/x"),
        ("https://gitlab.example.com/x?page=train", "https://gitlab.example.com/x?page=train"),
    ],
)
def test_a_login_in_a_value_is_a_secret(value: str, shown: str | None) -> None:
    masker = Masker(secret_values({"ADDRESS": value}))
    if shown is not None:
        assert masker.mask(value) == shown
    assert not any(word in masker.mask(value) for word in ("s3cr3tpw", ":pw@", "p%40ssword", "hf_abcdef"))
    if "%40" in value:
        assert masker.mask("it is p@ssword") == "it is ***"


def test_a_common_password_in_a_url_hides_only_itself() -> None:
    masker = Masker(secret_values({"DATABASE_URL": "postgres://postgres:postgres@db/x"}))
    assert masker.mask("postgres is up") == "postgres is up"


def test_a_private_key_is_a_secret_whatever_its_name() -> None:
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\n-----END OPENSSH PRIVATE KEY-----\n"
    assert list(secret_values({"WHATEVER": key})) == [key]


def test_order_is_kept_and_each_value_comes_once() -> None:
    env = {"A_TOKEN": "first-one", "N": "1", "B_TOKEN": None, "C_TOKEN": "second-one", "D_TOKEN": "first-one"}
    assert list(secret_values(env)) == ["first-one", "second-one"]


@given(st.text(max_size=40), st.text(max_size=60))
def test_any_name_and_value_are_handled(name: str, value: str) -> None:
    is_secret_name(name)
    for mode in ("secrets", "all"):
        for found in secret_values({name: value}, mask_env=mode):
            assert len(found) >= 5


@given(
    st.dictionaries(st.sampled_from(SECRET_NAMES), st.from_regex(r"[A-Za-z0-9_/+]{5,40}", fullmatch=True)),
    st.dictionaries(st.sampled_from(OTHER_NAMES), st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True)),
)
def test_no_secret_shows_and_nothing_else_is_hidden(secret: dict[str, str], other: dict[str, str]) -> None:
    env = {**other, **secret}
    found = set(secret_values(env))
    # What is left are texts that are too common.
    assert {value for value in secret.values() if len(value) >= 8 and not value.isalpha()} - {"disabled"} <= (
        found | {value for value in secret.values() if _is_number(value)}
    )
    assert found <= set(secret.values())
    masker = Masker(found)
    for value in found:
        assert value not in masker.mask(f"it is {value}, and {value}!")
    for value in other.values():
        if not any(line in value for line in found):
            assert masker.mask(value) == value


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return not (value.isdecimal() and len(value) >= 8)
