from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Document(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class Documents(_message.Message):
    __slots__ = ("documents",)
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[Document]
    def __init__(self, documents: _Optional[_Iterable[_Union[Document, _Mapping]]] = ...) -> None: ...

class StudyRequest(_message.Message):
    __slots__ = ("study_digest",)
    STUDY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    study_digest: bytes
    def __init__(self, study_digest: _Optional[bytes] = ...) -> None: ...

class EnrolmentRequest(_message.Message):
    __slots__ = ("token_secret", "site", "tls_request_pem", "identity_key", "supernode_key", "proof", "clock_unix_ms")
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TLS_REQUEST_PEM_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_KEY_FIELD_NUMBER: _ClassVar[int]
    SUPERNODE_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    CLOCK_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    token_secret: bytes
    site: str
    tls_request_pem: bytes
    identity_key: bytes
    supernode_key: bytes
    proof: bytes
    clock_unix_ms: int
    def __init__(self, token_secret: _Optional[bytes] = ..., site: _Optional[str] = ..., tls_request_pem: _Optional[bytes] = ..., identity_key: _Optional[bytes] = ..., supernode_key: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., clock_unix_ms: _Optional[int] = ...) -> None: ...

class EnrolmentCollect(_message.Message):
    __slots__ = ("token_secret", "site")
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    token_secret: bytes
    site: str
    def __init__(self, token_secret: _Optional[bytes] = ..., site: _Optional[str] = ...) -> None: ...

class EnrolmentAnswer(_message.Message):
    __slots__ = ("state", "certificate_pem", "authority_pem", "consortium", "coordinator_key", "clock_unix_ms")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[EnrolmentAnswer.State]
        PENDING: _ClassVar[EnrolmentAnswer.State]
        ADMITTED: _ClassVar[EnrolmentAnswer.State]
        REFUSED: _ClassVar[EnrolmentAnswer.State]
    UNSPECIFIED: EnrolmentAnswer.State
    PENDING: EnrolmentAnswer.State
    ADMITTED: EnrolmentAnswer.State
    REFUSED: EnrolmentAnswer.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_PEM_FIELD_NUMBER: _ClassVar[int]
    CONSORTIUM_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_KEY_FIELD_NUMBER: _ClassVar[int]
    CLOCK_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    state: EnrolmentAnswer.State
    certificate_pem: bytes
    authority_pem: bytes
    consortium: str
    coordinator_key: bytes
    clock_unix_ms: int
    def __init__(self, state: _Optional[_Union[EnrolmentAnswer.State, str]] = ..., certificate_pem: _Optional[bytes] = ..., authority_pem: _Optional[bytes] = ..., consortium: _Optional[str] = ..., coordinator_key: _Optional[bytes] = ..., clock_unix_ms: _Optional[int] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Invitation(_message.Message):
    __slots__ = ("site", "secret_sha256", "expires_unix")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SECRET_SHA256_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_FIELD_NUMBER: _ClassVar[int]
    site: str
    secret_sha256: bytes
    expires_unix: int
    def __init__(self, site: _Optional[str] = ..., secret_sha256: _Optional[bytes] = ..., expires_unix: _Optional[int] = ...) -> None: ...

class EnrolmentList(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[EnrolmentRow]
    def __init__(self, rows: _Optional[_Iterable[_Union[EnrolmentRow, _Mapping]]] = ...) -> None: ...

class EnrolmentRow(_message.Message):
    __slots__ = ("site", "state", "tls_request_pem", "identity_key", "supernode_key", "proof", "clock_skew_ms")
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TLS_REQUEST_PEM_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_KEY_FIELD_NUMBER: _ClassVar[int]
    SUPERNODE_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    CLOCK_SKEW_MS_FIELD_NUMBER: _ClassVar[int]
    site: str
    state: str
    tls_request_pem: bytes
    identity_key: bytes
    supernode_key: bytes
    proof: bytes
    clock_skew_ms: int
    def __init__(self, site: _Optional[str] = ..., state: _Optional[str] = ..., tls_request_pem: _Optional[bytes] = ..., identity_key: _Optional[bytes] = ..., supernode_key: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., clock_skew_ms: _Optional[int] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("site", "certificate_pem", "member", "refused")
    SITE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    site: str
    certificate_pem: bytes
    member: Document
    refused: bool
    def __init__(self, site: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ..., member: _Optional[_Union[Document, _Mapping]] = ..., refused: _Optional[bool] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("study", "bundle")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    study: Document
    bundle: bytes
    def __init__(self, study: _Optional[_Union[Document, _Mapping]] = ..., bundle: _Optional[bytes] = ...) -> None: ...

class StudyControl(_message.Message):
    __slots__ = ("study_digest", "act", "order")
    STUDY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACT_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    study_digest: bytes
    act: str
    order: Document
    def __init__(self, study_digest: _Optional[bytes] = ..., act: _Optional[str] = ..., order: _Optional[_Union[Document, _Mapping]] = ...) -> None: ...

class StudyStatus(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class JoinList(_message.Message):
    __slots__ = ("joins", "over", "bundle_sha256")
    JOINS_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    joins: _containers.RepeatedCompositeFieldContainer[Join]
    over: bool
    bundle_sha256: bytes
    def __init__(self, joins: _Optional[_Iterable[_Union[Join, _Mapping]]] = ..., over: _Optional[bool] = ..., bundle_sha256: _Optional[bytes] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("site", "supernode_key", "stands")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SUPERNODE_KEY_FIELD_NUMBER: _ClassVar[int]
    STANDS_FIELD_NUMBER: _ClassVar[int]
    site: str
    supernode_key: bytes
    stands: bool
    def __init__(self, site: _Optional[str] = ..., supernode_key: _Optional[bytes] = ..., stands: _Optional[bool] = ...) -> None: ...

class JoinReport(_message.Message):
    __slots__ = ("study_digest", "site", "status")
    STUDY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    study_digest: bytes
    site: str
    status: str
    def __init__(self, study_digest: _Optional[bytes] = ..., site: _Optional[str] = ..., status: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "resume", "session_proposal", "key_advertisement", "roster", "ratification", "round_start", "masked_input", "survivor_proposal", "survivor_ack", "unmask_request", "unmask_shares", "seed_request", "pair_seeds", "round_cancel", "cancel_ack", "hold", "withdraw", "study_refusal", "refusal", "chunk", "stop", "done", "receipt")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    SESSION_PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    KEY_ADVERTISEMENT_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    RATIFICATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_START_FIELD_NUMBER: _ClassVar[int]
    MASKED_INPUT_FIELD_NUMBER: _ClassVar[int]
    SURVIVOR_PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    SURVIVOR_ACK_FIELD_NUMBER: _ClassVar[int]
    UNMASK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    UNMASK_SHARES_FIELD_NUMBER: _ClassVar[int]
    SEED_REQUEST_FIELD_NUMBER: _ClassVar[int]
    PAIR_SEEDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_CANCEL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ACK_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    STUDY_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    resume: Resume
    session_proposal: SessionProposal
    key_advertisement: KeyAdvertisement
    roster: Roster
    ratification: Ratification
    round_start: RoundStart
    masked_input: MaskedInput
    survivor_proposal: SurvivorProposal
    survivor_ack: SurvivorAck
    unmask_request: UnmaskRequest
    unmask_shares: UnmaskShares
    seed_request: SeedRequest
    pair_seeds: PairSeeds
    round_cancel: RoundCancel
    cancel_ack: CancelAck
    hold: Hold
    withdraw: Withdraw
    study_refusal: StudyRefusal
    refusal: Refusal
    chunk: Chunk
    stop: Stop
    done: Done
    receipt: Receipt
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., session_proposal: _Optional[_Union[SessionProposal, _Mapping]] = ..., key_advertisement: _Optional[_Union[KeyAdvertisement, _Mapping]] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., ratification: _Optional[_Union[Ratification, _Mapping]] = ..., round_start: _Optional[_Union[RoundStart, _Mapping]] = ..., masked_input: _Optional[_Union[MaskedInput, _Mapping]] = ..., survivor_proposal: _Optional[_Union[SurvivorProposal, _Mapping]] = ..., survivor_ack: _Optional[_Union[SurvivorAck, _Mapping]] = ..., unmask_request: _Optional[_Union[UnmaskRequest, _Mapping]] = ..., unmask_shares: _Optional[_Union[UnmaskShares, _Mapping]] = ..., seed_request: _Optional[_Union[SeedRequest, _Mapping]] = ..., pair_seeds: _Optional[_Union[PairSeeds, _Mapping]] = ..., round_cancel: _Optional[_Union[RoundCancel, _Mapping]] = ..., cancel_ack: _Optional[_Union[CancelAck, _Mapping]] = ..., hold: _Optional[_Union[Hold, _Mapping]] = ..., withdraw: _Optional[_Union[Withdraw, _Mapping]] = ..., study_refusal: _Optional[_Union[StudyRefusal, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("product", "wire_min", "wire_max", "study_formats", "study_digest")
    PRODUCT_FIELD_NUMBER: _ClassVar[int]
    WIRE_MIN_FIELD_NUMBER: _ClassVar[int]
    WIRE_MAX_FIELD_NUMBER: _ClassVar[int]
    STUDY_FORMATS_FIELD_NUMBER: _ClassVar[int]
    STUDY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    product: str
    wire_min: int
    wire_max: int
    study_formats: _containers.RepeatedScalarFieldContainer[int]
    study_digest: bytes
    def __init__(self, product: _Optional[str] = ..., wire_min: _Optional[int] = ..., wire_max: _Optional[int] = ..., study_formats: _Optional[_Iterable[int]] = ..., study_digest: _Optional[bytes] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("session_id", "last_round", "state")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    last_round: int
    state: str
    def __init__(self, session_id: _Optional[bytes] = ..., last_round: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class SessionProposal(_message.Message):
    __slots__ = ("study_digest", "epoch", "roster", "max_corrupt", "min_active", "max_absent", "ring_bits", "mode", "suite")
    STUDY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    MAX_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    MIN_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    MAX_ABSENT_FIELD_NUMBER: _ClassVar[int]
    RING_BITS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SUITE_FIELD_NUMBER: _ClassVar[int]
    study_digest: bytes
    epoch: int
    roster: _containers.RepeatedScalarFieldContainer[bytes]
    max_corrupt: int
    min_active: int
    max_absent: int
    ring_bits: int
    mode: str
    suite: str
    def __init__(self, study_digest: _Optional[bytes] = ..., epoch: _Optional[int] = ..., roster: _Optional[_Iterable[bytes]] = ..., max_corrupt: _Optional[int] = ..., min_active: _Optional[int] = ..., max_absent: _Optional[int] = ..., ring_bits: _Optional[int] = ..., mode: _Optional[str] = ..., suite: _Optional[str] = ...) -> None: ...

class KeyAdvertisement(_message.Message):
    __slots__ = ("index", "kx", "data_set", "counter", "head", "signature", "session_id")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KX_FIELD_NUMBER: _ClassVar[int]
    DATA_SET_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    index: int
    kx: bytes
    data_set: str
    counter: int
    head: bytes
    signature: bytes
    session_id: bytes
    def __init__(self, index: _Optional[int] = ..., kx: _Optional[bytes] = ..., data_set: _Optional[str] = ..., counter: _Optional[int] = ..., head: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., session_id: _Optional[bytes] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("advertisements",)
    ADVERTISEMENTS_FIELD_NUMBER: _ClassVar[int]
    advertisements: _containers.RepeatedCompositeFieldContainer[KeyAdvertisement]
    def __init__(self, advertisements: _Optional[_Iterable[_Union[KeyAdvertisement, _Mapping]]] = ...) -> None: ...

class SeenAdvertisement(_message.Message):
    __slots__ = ("index", "hash", "advertisement")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    ADVERTISEMENT_FIELD_NUMBER: _ClassVar[int]
    index: int
    hash: bytes
    advertisement: KeyAdvertisement
    def __init__(self, index: _Optional[int] = ..., hash: _Optional[bytes] = ..., advertisement: _Optional[_Union[KeyAdvertisement, _Mapping]] = ...) -> None: ...

class Ratification(_message.Message):
    __slots__ = ("index", "session_id", "roster_hash", "seen", "signature", "seen_advertisements")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ROSTER_HASH_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SEEN_ADVERTISEMENTS_FIELD_NUMBER: _ClassVar[int]
    index: int
    session_id: bytes
    roster_hash: bytes
    seen: _containers.RepeatedScalarFieldContainer[bytes]
    signature: bytes
    seen_advertisements: _containers.RepeatedCompositeFieldContainer[KeyAdvertisement]
    def __init__(self, index: _Optional[int] = ..., session_id: _Optional[bytes] = ..., roster_hash: _Optional[bytes] = ..., seen: _Optional[_Iterable[bytes]] = ..., signature: _Optional[bytes] = ..., seen_advertisements: _Optional[_Iterable[_Union[KeyAdvertisement, _Mapping]]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("study_digest", "analysis", "step", "attempt", "broadcast", "layout", "codec", "clip", "noise", "event")
    STUDY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANALYSIS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    study_digest: bytes
    analysis: str
    step: int
    attempt: int
    broadcast: bytes
    layout: bytes
    codec: str
    clip: str
    noise: str
    event: str
    def __init__(self, study_digest: _Optional[bytes] = ..., analysis: _Optional[str] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ..., broadcast: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., codec: _Optional[str] = ..., clip: _Optional[str] = ..., noise: _Optional[str] = ..., event: _Optional[str] = ...) -> None: ...

class CancelSet(_message.Message):
    __slots__ = ("ctx", "cancels")
    CTX_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    ctx: bytes
    cancels: _containers.RepeatedCompositeFieldContainer[CancelAck]
    def __init__(self, ctx: _Optional[bytes] = ..., cancels: _Optional[_Iterable[_Union[CancelAck, _Mapping]]] = ...) -> None: ...

class RoundStart(_message.Message):
    __slots__ = ("session_id", "round", "active", "length", "coordinates", "task", "ratifications", "cancels", "payload_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    RATIFICATIONS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    round: int
    active: _containers.RepeatedScalarFieldContainer[int]
    length: int
    coordinates: int
    task: Task
    ratifications: _containers.RepeatedCompositeFieldContainer[Ratification]
    cancels: _containers.RepeatedCompositeFieldContainer[CancelSet]
    payload_bytes: int
    def __init__(self, session_id: _Optional[bytes] = ..., round: _Optional[int] = ..., active: _Optional[_Iterable[int]] = ..., length: _Optional[int] = ..., coordinates: _Optional[int] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., ratifications: _Optional[_Iterable[_Union[Ratification, _Mapping]]] = ..., cancels: _Optional[_Iterable[_Union[CancelSet, _Mapping]]] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("to", "box")
    TO_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    to: int
    box: bytes
    def __init__(self, to: _Optional[int] = ..., box: _Optional[bytes] = ...) -> None: ...

class MaskedInput(_message.Message):
    __slots__ = ("index", "ctx", "salt", "commit", "seals", "signature", "payload_bytes")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CTX_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    SEALS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    index: int
    ctx: bytes
    salt: bytes
    commit: bytes
    seals: _containers.RepeatedCompositeFieldContainer[Sealed]
    signature: bytes
    payload_bytes: int
    def __init__(self, index: _Optional[int] = ..., ctx: _Optional[bytes] = ..., salt: _Optional[bytes] = ..., commit: _Optional[bytes] = ..., seals: _Optional[_Iterable[_Union[Sealed, _Mapping]]] = ..., signature: _Optional[bytes] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("index", "signature")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    index: int
    signature: bytes
    def __init__(self, index: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SurvivorProposal(_message.Message):
    __slots__ = ("ctx", "version", "survivors", "salts")
    CTX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SALTS_FIELD_NUMBER: _ClassVar[int]
    ctx: bytes
    version: int
    survivors: _containers.RepeatedScalarFieldContainer[int]
    salts: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, ctx: _Optional[bytes] = ..., version: _Optional[int] = ..., survivors: _Optional[_Iterable[int]] = ..., salts: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SurvivorAck(_message.Message):
    __slots__ = ("index", "version", "digest", "signature")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    index: int
    version: int
    digest: bytes
    signature: bytes
    def __init__(self, index: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class UnmaskRequest(_message.Message):
    __slots__ = ("ctx", "version", "survivors", "salts", "seals", "acks")
    CTX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SALTS_FIELD_NUMBER: _ClassVar[int]
    SEALS_FIELD_NUMBER: _ClassVar[int]
    ACKS_FIELD_NUMBER: _ClassVar[int]
    ctx: bytes
    version: int
    survivors: _containers.RepeatedScalarFieldContainer[int]
    salts: _containers.RepeatedScalarFieldContainer[bytes]
    seals: _containers.RepeatedCompositeFieldContainer[Sealed]
    acks: _containers.RepeatedCompositeFieldContainer[Ack]
    def __init__(self, ctx: _Optional[bytes] = ..., version: _Optional[int] = ..., survivors: _Optional[_Iterable[int]] = ..., salts: _Optional[_Iterable[bytes]] = ..., seals: _Optional[_Iterable[_Union[Sealed, _Mapping]]] = ..., acks: _Optional[_Iterable[_Union[Ack, _Mapping]]] = ...) -> None: ...

class Indexed(_message.Message):
    __slots__ = ("index", "value")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    index: int
    value: bytes
    def __init__(self, index: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...

class UnmaskShares(_message.Message):
    __slots__ = ("index", "ctx", "version", "shares", "pair_seeds")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CTX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    PAIR_SEEDS_FIELD_NUMBER: _ClassVar[int]
    index: int
    ctx: bytes
    version: int
    shares: _containers.RepeatedCompositeFieldContainer[Indexed]
    pair_seeds: _containers.RepeatedCompositeFieldContainer[Indexed]
    def __init__(self, index: _Optional[int] = ..., ctx: _Optional[bytes] = ..., version: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[Indexed, _Mapping]]] = ..., pair_seeds: _Optional[_Iterable[_Union[Indexed, _Mapping]]] = ...) -> None: ...

class SeedRequest(_message.Message):
    __slots__ = ("round_start", "ctx", "version", "survivors", "salts", "acks", "wanted")
    ROUND_START_FIELD_NUMBER: _ClassVar[int]
    CTX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SALTS_FIELD_NUMBER: _ClassVar[int]
    ACKS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    round_start: RoundStart
    ctx: bytes
    version: int
    survivors: _containers.RepeatedScalarFieldContainer[int]
    salts: _containers.RepeatedScalarFieldContainer[bytes]
    acks: _containers.RepeatedCompositeFieldContainer[Ack]
    wanted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round_start: _Optional[_Union[RoundStart, _Mapping]] = ..., ctx: _Optional[bytes] = ..., version: _Optional[int] = ..., survivors: _Optional[_Iterable[int]] = ..., salts: _Optional[_Iterable[bytes]] = ..., acks: _Optional[_Iterable[_Union[Ack, _Mapping]]] = ..., wanted: _Optional[_Iterable[int]] = ...) -> None: ...

class PairSeeds(_message.Message):
    __slots__ = ("index", "ctx", "pair_seeds")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CTX_FIELD_NUMBER: _ClassVar[int]
    PAIR_SEEDS_FIELD_NUMBER: _ClassVar[int]
    index: int
    ctx: bytes
    pair_seeds: _containers.RepeatedCompositeFieldContainer[Indexed]
    def __init__(self, index: _Optional[int] = ..., ctx: _Optional[bytes] = ..., pair_seeds: _Optional[_Iterable[_Union[Indexed, _Mapping]]] = ...) -> None: ...

class RoundCancel(_message.Message):
    __slots__ = ("ctx",)
    CTX_FIELD_NUMBER: _ClassVar[int]
    ctx: bytes
    def __init__(self, ctx: _Optional[bytes] = ...) -> None: ...

class CancelAck(_message.Message):
    __slots__ = ("index", "ctx", "signature")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CTX_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    index: int
    ctx: bytes
    signature: bytes
    def __init__(self, index: _Optional[int] = ..., ctx: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Hold(_message.Message):
    __slots__ = ("round", "until_unix")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    UNTIL_UNIX_FIELD_NUMBER: _ClassVar[int]
    round: int
    until_unix: int
    def __init__(self, round: _Optional[int] = ..., until_unix: _Optional[int] = ...) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("study_digest", "session_id")
    STUDY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    study_digest: bytes
    session_id: bytes
    def __init__(self, study_digest: _Optional[bytes] = ..., session_id: _Optional[bytes] = ...) -> None: ...

class StudyRefusal(_message.Message):
    __slots__ = ("code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    code: str
    def __init__(self, code: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("box_failed", "has_box_failed")
    BOX_FAILED_FIELD_NUMBER: _ClassVar[int]
    HAS_BOX_FAILED_FIELD_NUMBER: _ClassVar[int]
    box_failed: int
    has_box_failed: bool
    def __init__(self, box_failed: _Optional[int] = ..., has_box_failed: _Optional[bool] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("results_sha256",)
    RESULTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    results_sha256: bytes
    def __init__(self, results_sha256: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: Document
    def __init__(self, receipt: _Optional[_Union[Document, _Mapping]] = ...) -> None: ...
