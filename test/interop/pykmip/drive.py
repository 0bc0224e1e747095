# Drives a KMIP server with every operation that PyKMIP's clients have.
#
#   drive.py PORT CERT CA VERSION
#
# Each line it prints is one use of an operation: its name, a tab, and what came
# of it: "ok", "refused REASON", or "wrong" and how. What a cipher should give is
# computed here, by another library than the server's.
import hashlib
import hmac
import sys
import time

from cryptography.hazmat.backends import default_backend
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from kmip.core import attributes as cattributes
from kmip.core import enums, objects
from kmip.core import exceptions as cexceptions
from kmip.core.attributes import DerivationParameters
from kmip.core.factories.attributes import AttributeFactory
from kmip.pie import client as pie
from kmip.pie import exceptions, objects as pobjects
from kmip.services.kmip_client import KMIPProxy

port, cert, ca, version = sys.argv[1:5]
V = getattr(enums.KMIPVersion, "KMIP_" + version.replace(".", "_"))
attributes = AttributeFactory()
E = enums
AES = E.CryptographicAlgorithm.AES
M = E.CryptographicUsageMask
FAILURES = (exceptions.KmipOperationFailure, cexceptions.OperationFailure)
DATA = bytes(range(48))
IV = bytes(range(16, 32))


def attribute(kind, value):
    return attributes.create_attribute(kind, value)


def use(name, f, *args, **kwargs):
    """f returns True when all is right, or says what is not."""
    try:
        got = f(*args, **kwargs)
        text = "ok" if got is True else "wrong: %r" % (got,)
    except FAILURES as e:
        text = "refused " + e.reason.name
    except Exception as e:  # the client's own opinion of an answer
        text = "wrong: %s: %s" % (type(e).__name__, e)
    print(name + "\t" + text)
    sys.stdout.flush()


def refusal(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except FAILURES as e:
        return e.reason
    return None


arguments = dict(cert=cert, key=cert, ca=ca, ssl_version="PROTOCOL_TLSv1_2", kmip_version=V)
c = pie.ProxyKmipClient(hostname="127.0.0.1", port=int(port), **arguments)
c.open()
ids = {}
name = "pykmip-" + version
BOTH = [M.ENCRYPT, M.DECRYPT]


def register(value, masks, label, algorithm=AES):
    return c.register(pobjects.SymmetricKey(algorithm, len(value) * 8, value, masks=masks, name=name + "-" + label))


def state(uid):
    return c.get_attributes(uid, ["State"])[1][0].attribute_value.value


# Making and registering.

def create():
    ids["made"] = c.create(AES, 256, name=name, cryptographic_usage_mask=BOTH)
    return bool(ids["made"])


def create_taken():
    return refusal(c.create, AES, 256, None, name) == E.ResultReason.INVALID_FIELD


def create_policy():
    return bool(c.create(AES, 128, operation_policy_name="no-such-policy"))


use("create", create)
use("create: a taken name", create_taken)
use("create: an unknown operation policy", create_policy)


def register_key():
    ids["known"] = register(bytes(32), BOTH + [M.WRAP_KEY, M.UNWRAP_KEY, M.DERIVE_KEY, M.MAC_GENERATE, M.MAC_VERIFY], "known")
    return c.get(ids["known"]).value == bytes(32)


def register_secret():
    ids["word"] = c.register(pobjects.SecretData(b"secret word", E.SecretDataType.PASSWORD, masks=[M.DERIVE_KEY], name=name + "-word"))
    got = c.get(ids["word"])
    return got.value == b"secret word" and got.data_type == E.SecretDataType.PASSWORD


def register_opaque():
    ids["blob"] = c.register(pobjects.OpaqueObject(b"anything", E.OpaqueDataType.NONE, name=name + "-blob"))
    return c.get(ids["blob"]).value == b"anything"


def register_mac_key():
    ids["mac"] = register(b"k" * 32, [M.MAC_GENERATE, M.MAC_VERIFY], "mac", E.CryptographicAlgorithm.HMAC_SHA256)
    return c.get(ids["mac"]).value == b"k" * 32


use("register", register_key)
use("register: secret data", register_secret)
use("register: an opaque object", register_opaque)
use("register: a MAC key", register_mac_key)
use("create_key_pair", lambda: bool(c.create_key_pair(E.CryptographicAlgorithm.RSA, 2048)))


# Reading.

def get():
    k = c.get(ids["made"])
    return isinstance(k, pobjects.SymmetricKey) and len(k.value) == 32 and k.cryptographic_length == 256 and k.cryptographic_algorithm == AES


def get_wrapped():
    # A wrapped Key Value is a Byte String (KMIP 1.4 section 2.1.4); PyKMIP wants a
    # structure and stumbles, so what it received is looked at.
    c.activate(ids["known"])
    spec = {"wrapping_method": E.WrappingMethod.ENCRYPT, "encryption_key_information": {
        "unique_identifier": ids["known"],
        "cryptographic_parameters": {"block_cipher_mode": E.BlockCipherMode.NIST_KEY_WRAP}}}
    if version not in ("1.0", "1.1"):
        spec["encoding_option"] = E.EncodingOption.NO_ENCODING
    received, receive = [], c.proxy._receive_message

    def listen():
        m = receive()
        received.append(bytes(m.buffer))
        return m
    c.proxy._receive_message = listen
    try:
        c.get(ids["made"], spec)
    except FAILURES:
        raise
    except Exception:
        pass
    finally:
        c.proxy._receive_message = receive
    message = received[0]
    at = message.find(bytes.fromhex("42004508"))
    if at < 0:
        return message.hex()
    size = int.from_bytes(message[at + 4:at + 8], "big")
    got = keywrap.aes_key_unwrap(bytes(32), message[at + 8:at + 8 + size], default_backend())
    plain = c.get(ids["made"]).value
    return got == plain or got.endswith(plain) and got.startswith(bytes.fromhex("420045"))


def get_guess():
    return refusal(c.get, "00000000-0000-0000-0000-000000000000") == E.ResultReason.ITEM_NOT_FOUND


use("get", get)
use("get: wrapped", get_wrapped)
use("get: a guess", get_guess)


def get_attributes():
    uid, got = c.get_attributes(ids["made"], ["State", "Name", "Cryptographic Length", "x-none"])
    v = {a.attribute_name.value: a.attribute_value for a in got}
    return uid == ids["made"] and set(v) == {"State", "Name", "Cryptographic Length"} and v["State"].value == E.State.PRE_ACTIVE \
        and v["Name"].name_value.value == name and v["Cryptographic Length"].value == 256


def get_all_attributes():
    # The client cannot read a Digest of KMIP 1.0, which has no Key Format Type,
    # nor some attributes of 1.2 to 1.4.
    names = set(c.get_attribute_list(ids["made"])) - {"Original Creation Date", "Random Number Generator", "Sensitive", "Always Sensitive", "Extractable", "Never Extractable"}
    if version == "1.0":
        names -= {"Digest"}
    _, got = c.get_attributes(ids["made"], sorted(names))
    return {a.attribute_name.value for a in got} == names and {"Unique Identifier", "Object Type", "Name", "State", "Lease Time"} <= names or names


def get_attribute_list():
    names = set(c.get_attribute_list(ids["made"]))
    return {"Unique Identifier", "Object Type", "Name", "State", "Digest", "Initial Date", "Last Change Date"} <= names or names


use("get_attributes", get_attributes)
use("get_attributes: all", get_all_attributes)
use("get_attribute_list", get_attribute_list)


def locate(want, *filters, **kwargs):
    return lambda: (lambda got: sorted(got) == sorted(want()) or got)(c.locate(attributes=list(filters) or None, **kwargs))


now = int(time.time())
use("locate: by name", locate(lambda: [ids["made"]], attribute(E.AttributeType.NAME, name)))
use("locate: by state and algorithm", locate(lambda: [ids["known"]], attribute(E.AttributeType.STATE, E.State.ACTIVE),
                                              attribute(E.AttributeType.CRYPTOGRAPHIC_ALGORITHM, AES)))
use("locate: by object type", locate(lambda: [ids["word"]], attribute(E.AttributeType.OBJECT_TYPE, E.ObjectType.SECRET_DATA)))
use("locate: by length", locate(lambda: [ids["mac"]], attribute(E.AttributeType.CRYPTOGRAPHIC_LENGTH, 256),
                                attribute(E.AttributeType.CRYPTOGRAPHIC_ALGORITHM, E.CryptographicAlgorithm.HMAC_SHA256)))
use("locate: by identifier", locate(lambda: [ids["blob"]], attribute(E.AttributeType.UNIQUE_IDENTIFIER, ids["blob"])))
use("locate: by dates", locate(lambda: [ids["made"]], attribute(E.AttributeType.INITIAL_DATE, now - 600), attribute(E.AttributeType.INITIAL_DATE, now + 600),
                               attribute(E.AttributeType.NAME, name)))
use("locate: before its time", locate(lambda: [], attribute(E.AttributeType.INITIAL_DATE, now - 900), attribute(E.AttributeType.INITIAL_DATE, now - 600)))
use("locate: nothing", locate(lambda: [], attribute(E.AttributeType.NAME, "none")))
use("locate: at most two", lambda: len(c.locate(maximum_items=2)) == 2)
use("locate: with an offset", lambda: len(c.locate(offset_items=1)) == len(c.locate()) - 1)
use("locate: archived", lambda: c.locate(storage_status_mask=2) == [])


def check():
    got = c.check(ids["known"], cryptographic_usage_mask=[M.ENCRYPT])
    return got == ids["known"] or got


def check_other():
    got = refusal(c.check, ids["made"], cryptographic_usage_mask=[M.SIGN])
    # KMIP 1.4 §4.9: what does not fit is given back; or it is refused.
    return got in (None, E.ResultReason.ILLEGAL_OPERATION, E.ResultReason.PERMISSION_DENIED, E.ResultReason.INVALID_FIELD) or got


use("check", check)
use("check: another use", check_other)


# Attributes.

def modify():
    new = cattributes.Name.create(name + "-b", E.NameType.UNINTERPRETED_TEXT_STRING)
    old = objects.Attribute(attribute_name=objects.Attribute.AttributeName("Name"), attribute_index=objects.Attribute.AttributeIndex(0), attribute_value=new)
    uid, got = c.modify_attribute(ids["made"], attribute=old)
    return uid == ids["made"] and got.attribute_value.name_value.value == name + "-b" and c.locate(attributes=[attribute(E.AttributeType.NAME, name + "-b")]) == [ids["made"]]


def modify_state():
    a = objects.Attribute(attribute_name=objects.Attribute.AttributeName("State"), attribute_value=attribute(E.AttributeType.STATE, E.State.ACTIVE).attribute_value)
    return refusal(c.modify_attribute, ids["made"], attribute=a) == E.ResultReason.PERMISSION_DENIED


def delete():
    uid, got = c.delete_attribute(ids["made"], attribute_name="Name", attribute_index=0)
    return uid == ids["made"] and got.attribute_value.name_value.value == name + "-b" and c.locate(attributes=[attribute(E.AttributeType.NAME, name + "-b")]) == []


use("modify_attribute", modify)
use("modify_attribute: State", modify_state)
use("delete_attribute", delete)
use("delete_attribute: State", lambda: refusal(c.delete_attribute, ids["made"], attribute_name="State") == E.ResultReason.PERMISSION_DENIED)


# New keys from old ones.

def rekey():
    ids["next"] = c.rekey(ids["known"], offset=0)
    return ids["next"] != ids["known"] and c.get(ids["next"]).value != bytes(32) and state(ids["next"]) == E.State.ACTIVE \
        and c.locate(attributes=[attribute(E.AttributeType.NAME, name + "-known")]) == [ids["next"]]


def derive(ids, method, parameters):
    # The upper client has no way to give a Cryptographic Usage Mask, which a key
    # must have (KMIP 1.4 section 3.19); the lower one has.
    p = DerivationParameters(cryptographic_parameters=c._build_cryptographic_parameters(parameters.pop("cryptographic_parameters")), **parameters)
    t = objects.TemplateAttribute(attributes=[
        attribute(E.AttributeType.CRYPTOGRAPHIC_LENGTH, 256), attribute(E.AttributeType.CRYPTOGRAPHIC_ALGORITHM, AES),
        attribute(E.AttributeType.CRYPTOGRAPHIC_USAGE_MASK, BOTH)])
    got = c.proxy.derive_key(E.ObjectType.SYMMETRIC_KEY, ids, method, p, t)
    if got["result_status"] != E.ResultStatus.SUCCESS:
        raise exceptions.KmipOperationFailure(got["result_status"], got["result_reason"], got["result_message"])
    return got["unique_identifier"]


def derive_upper():
    # Without a mask there is a reason, and nothing is made.
    return refusal(c.derive_key, E.ObjectType.SYMMETRIC_KEY, [ids["known"]], E.DerivationMethod.HMAC, {
        "cryptographic_parameters": {"hashing_algorithm": E.HashingAlgorithm.SHA_256}, "derivation_data": b"derive me"},
        cryptographic_length=256, cryptographic_algorithm=AES) == E.ResultReason.INVALID_FIELD


def derive_hmac():
    parameters = {"cryptographic_parameters": {"hashing_algorithm": E.HashingAlgorithm.SHA_256}, "derivation_data": b"derive me"}
    uid = derive([ids["known"]], E.DerivationMethod.HMAC, parameters)
    return c.get(uid).value == hmac.new(bytes(32), b"derive me", hashlib.sha256).digest()


def derive_pbkdf2():
    parameters = {"cryptographic_parameters": {"hashing_algorithm": E.HashingAlgorithm.SHA_256}, "salt": b"salt", "iteration_count": 4096}
    c.activate(ids["word"])
    uid = derive([ids["word"]], E.DerivationMethod.PBKDF2, parameters)
    want = PBKDF2HMAC(algorithm=hashes.SHA256(), length=32, salt=b"salt", iterations=4096, backend=default_backend()).derive(b"secret word")
    return c.get(uid).value == want


def derive_encrypt():
    parameters = {"cryptographic_parameters": {"block_cipher_mode": E.BlockCipherMode.CBC, "padding_method": E.PaddingMethod.NONE, "cryptographic_algorithm": AES},
                  "initialization_vector": IV, "derivation_data": DATA[:32]}
    uid = derive([ids["known"]], E.DerivationMethod.ENCRYPT, parameters)
    e = Cipher(algorithms.AES(bytes(32)), modes.CBC(IV), default_backend()).encryptor()
    return c.get(uid).value == e.update(DATA[:32]) + e.finalize()


use("rekey", rekey)
use("derive_key: no mask", derive_upper)
use("derive_key: HMAC", derive_hmac)
use("derive_key: PBKDF2", derive_pbkdf2)
use("derive_key: encryption", derive_encrypt)


# Ciphers and MACs.

def crypt(parameters, mode, iv):
    def run():
        e = Cipher(algorithms.AES(bytes(32)), mode, default_backend()).encryptor()
        want = e.update(DATA) + e.finalize()
        got, _ = c.encrypt(DATA, uid=ids["known"], cryptographic_parameters=parameters, iv_counter_nonce=iv)
        if got != want:
            return got
        return c.decrypt(got, uid=ids["known"], cryptographic_parameters=parameters, iv_counter_nonce=iv) == DATA
    return run


for label, mode, oracle, iv in (("ECB", E.BlockCipherMode.ECB, modes.ECB(), None), ("CBC", E.BlockCipherMode.CBC, modes.CBC(IV), IV),
                                ("CTR", E.BlockCipherMode.CTR, modes.CTR(IV), IV)):
    use("encrypt, decrypt: " + label, crypt({"cryptographic_algorithm": AES, "block_cipher_mode": mode, "padding_method": E.PaddingMethod.NONE}, oracle, iv))
use("encrypt, decrypt: padded", lambda: (lambda p: c.decrypt(c.encrypt(b"short", uid=ids["known"], cryptographic_parameters=p, iv_counter_nonce=IV)[0],
                                                            uid=ids["known"], cryptographic_parameters=p, iv_counter_nonce=IV) == b"short")(
    {"cryptographic_algorithm": AES, "block_cipher_mode": E.BlockCipherMode.CBC, "padding_method": E.PaddingMethod.PKCS5}))


def mac():
    c.activate(ids["mac"])
    uid, got = c.mac(DATA, ids["mac"], E.CryptographicAlgorithm.HMAC_SHA256)
    return uid == ids["mac"] and got == hmac.new(b"k" * 32, DATA, hashlib.sha256).digest()


use("mac", mac)
use("sign", lambda: bool(c.sign(DATA, ids["known"])))
use("signature_verify", lambda: bool(c.signature_verify(DATA, DATA, ids["known"])))


# The end of keys.

def activate():
    c.activate(ids["made"])
    return state(ids["made"]) == E.State.ACTIVE


def revoke():
    c.revoke(E.RevocationReasonCode.CESSATION_OF_OPERATION, ids["made"], "done")
    return state(ids["made"]) == E.State.DEACTIVATED


def compromise():
    c.revoke(E.RevocationReasonCode.KEY_COMPROMISE, ids["word"], "seen", now - 60)
    return state(ids["word"]) == E.State.COMPROMISED


def destroy():
    c.destroy(ids["made"])
    return refusal(c.get, ids["made"]) == E.ResultReason.ITEM_NOT_FOUND


use("activate", activate)
use("activate: again", lambda: refusal(c.activate, ids["made"]) == E.ResultReason.PERMISSION_DENIED)
use("destroy: while active", lambda: refusal(c.destroy, ids["made"]) == E.ResultReason.PERMISSION_DENIED)
use("revoke", revoke)
use("get: deactivated", lambda: len(c.get(ids["made"]).value) == 32)
use("revoke: compromised", compromise)
use("destroy", destroy)
c.close()


# The lower client, for what the upper one has no method.
p = KMIPProxy(host="127.0.0.1", port=int(port), certfile=cert, keyfile=cert, ca_certs=ca, ssl_version="PROTOCOL_TLSv1_2",
              kmip_version=V, cert_reqs="CERT_REQUIRED", do_handshake_on_connect="True", suppress_ragged_eofs="True")
p.open()


def answer(r):
    if r.result_status.value != E.ResultStatus.SUCCESS:
        raise exceptions.KmipOperationFailure(r.result_status.value, r.result_reason.value, r.result_message.value)
    return r


def query():
    r = answer(p.query(query_functions=[E.QueryFunction.QUERY_OPERATIONS, E.QueryFunction.QUERY_OBJECTS, E.QueryFunction.QUERY_SERVER_INFORMATION]))
    return {E.Operation.CREATE, E.Operation.GET, E.Operation.REGISTER, E.Operation.LOCATE} <= set(r.operations) \
        and set(r.object_types) == {E.ObjectType.SYMMETRIC_KEY, E.ObjectType.SECRET_DATA, E.ObjectType.OPAQUE_DATA} and bool(r.vendor_identification) or r.object_types


def discover():
    # The client stumbles over a refusal, so it is asked what it received.
    request = p._build_request_message(None, [p._build_discover_versions_batch_item()])
    item = p._send_and_receive_message(request).batch_items[0]
    if item.result_status.value != E.ResultStatus.SUCCESS:
        raise exceptions.KmipOperationFailure(item.result_status.value, item.result_reason.value, item.result_message.value)
    r = answer(p.discover_versions())
    got = [(v.major, v.minor) for v in r.protocol_versions]
    return got == [(1, 4), (1, 3), (1, 2), (1, 1), (1, 0)] or got


use("query", query)
use("discover_versions", discover)
use("rekey_key_pair", lambda: bool(answer(p.rekey_key_pair(private_key_uuid=None))))
p.close()
