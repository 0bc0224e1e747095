package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

const (
	maxName       = 4096    // a string of the protocol, in bytes
	maxOptionData = 1 << 16 // the data of one option, in bytes
	maxOptions    = 256     // before a client has to choose an export
)

// errHangUp says that a client ended the negotiation as it may.
var errHangUp = errors.New("nbd: client ended the negotiation")

// handshake is the state of one negotiation.
type handshake struct {
	conn   *conn
	srv    *Server
	stream net.Conn // in TLS after STARTTLS
	r      *bufio.Reader
	peer   string // who the client's certificate says it is

	noZeroes   bool
	structured bool     // STRUCTURED_REPLY was agreed on
	metaExport string   // what the last SET_META_CONTEXT was for
	chosen     contexts // by it
}

// agreement is what a negotiation ended with.
type agreement struct {
	exp        *Export
	structured bool
	contexts   contexts
}

// run negotiates until the client has chosen an export.
func (h *handshake) run() (agreement, error) {
	var hello [18]byte
	binary.BigEndian.PutUint64(hello[0:], magicInit)
	binary.BigEndian.PutUint64(hello[8:], magicOption)
	binary.BigEndian.PutUint16(hello[16:], flagFixedNewstyle|flagNoZeroes)
	if _, err := h.stream.Write(hello[:]); err != nil {
		return agreement{}, err
	}
	var b [4]byte
	if _, err := io.ReadFull(h.r, b[:]); err != nil {
		return agreement{}, err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return agreement{}, fmt.Errorf("nbd: unknown client flags %#x", flags)
	}
	h.noZeroes = flags&flagNoZeroes != 0
	for range maxOptions {
		exp, err := h.option()
		if err != nil {
			return agreement{}, err
		}
		if exp != nil {
			a := agreement{exp: exp, structured: h.structured}
			if h.metaExport == exp.name {
				a.contexts = h.chosen
			}
			return a, nil
		}
	}
	return agreement{}, fmt.Errorf("nbd: no export chosen after %d options", maxOptions)
}

// option answers one option; an export is the client's choice.
func (h *handshake) option() (*Export, error) {
	var head [16]byte
	if _, err := io.ReadFull(h.r, head[:]); err != nil {
		return nil, err
	}
	if magic := binary.BigEndian.Uint64(head[:]); magic != magicOption {
		return nil, fmt.Errorf("nbd: option with magic %#x", magic)
	}
	opt := option(binary.BigEndian.Uint32(head[8:]))
	n := binary.BigEndian.Uint32(head[12:])
	if n > maxOptionData {
		return nil, fmt.Errorf("nbd: option %d with %d bytes of data, at most %d are read", opt, n, maxOptionData)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(h.r, data); err != nil {
		return nil, err
	}
	if h.srv.draining() && opt != optAbort {
		if opt == optExportName {
			return nil, errShutdown
		}
		return nil, h.refuse(opt, repErrShutdown, "the server is shutting down")
	}
	if h.conn.tls != nil && h.stream == h.conn.nc && opt != optStartTLS && opt != optAbort {
		if opt == optExportName {
			return nil, errors.New("nbd: client asks for an export without TLS")
		}
		return nil, h.refuse(opt, repErrTLSReqd, "this server wants TLS with a client certificate first")
	}
	switch opt {
	case optStartTLS:
		return nil, h.startTLS(data)
	case optExportName:
		return h.exportName(string(data))
	case optAbort:
		_ = h.reply(opt, repAck, nil) // the client may have gone already
		return nil, errHangUp
	case optList:
		return nil, h.list(data)
	case optInfo, optGo:
		return h.info(opt, data)
	case optStructuredReply:
		if len(data) != 0 {
			return nil, h.refuse(opt, repErrInvalid, "this option has no data")
		}
		h.structured = true
		return nil, h.reply(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		return nil, h.metaContext(opt, data)
	}
	return nil, h.refuse(opt, repErrUnsup, "unknown option")
}

// exportName is the one option that cannot be refused: an unknown name ends
// the connection.
func (h *handshake) exportName(name string) (*Export, error) {
	exp := h.srv.claim(name, h.conn)
	if exp == nil {
		return nil, fmt.Errorf("nbd: no export %q", clip(name))
	}
	b := make([]byte, 10, 134)
	binary.BigEndian.PutUint64(b, uint64(exp.dev.Size()))
	binary.BigEndian.PutUint16(b[8:], h.transmissionFlags(exp))
	if !h.noZeroes {
		b = b[:134]
	}
	_, err := h.stream.Write(b)
	return exp, err
}

func (h *handshake) list(data []byte) error {
	if len(data) != 0 {
		return h.refuse(optList, repErrInvalid, "this option has no data")
	}
	for _, name := range h.srv.names() {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		if err := h.reply(optList, repServer, append(b, name...)); err != nil {
			return err
		}
	}
	return h.reply(optList, repAck, nil)
}

// info answers INFO and GO: 32-bit length and name of the export, 16-bit count
// and 16-bit numbers of the information wanted. The export and the block sizes
// are sent whether asked for or not, as the protocol allows.
func (h *handshake) info(opt option, data []byte) (*Export, error) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest)-2 != 2*int(binary.BigEndian.Uint16(rest)) {
		return nil, h.refuse(opt, repErrInvalid, "malformed request for information")
	}
	exp := h.srv.claim(name, h.conn)
	if exp == nil {
		return nil, h.refuse(opt, repErrUnknown, fmt.Sprintf("no export %q", clip(name)))
	}
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(exp.dev.Size()))
	b = binary.BigEndian.AppendUint16(b, h.transmissionFlags(exp))
	if err := h.reply(opt, repInfo, b); err != nil {
		return nil, err
	}
	b = binary.BigEndian.AppendUint16(b[:0], infoBlockSize)
	b = binary.BigEndian.AppendUint32(b, SectorSize)
	b = binary.BigEndian.AppendUint32(b, preferredBlock)
	b = binary.BigEndian.AppendUint32(b, maxPayload)
	if err := h.reply(opt, repInfo, b); err != nil {
		return nil, err
	}
	if err := h.reply(opt, repAck, nil); err != nil || opt == optInfo {
		return nil, err
	}
	return exp, nil
}

func (h *handshake) transmissionFlags(exp *Export) uint16 {
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn)
	if exp.readOnly {
		flags |= flagReadOnly
	} else {
		flags |= flagSendTrim | flagSendWriteZeroes | flagSendFastZero
	}
	if h.structured {
		flags |= flagSendDF
	}
	return flags
}

func (h *handshake) refuse(opt option, why uint32, text string) error {
	return h.reply(opt, why, []byte(text))
}

func (h *handshake) reply(opt option, kind uint32, data []byte) error {
	b := make([]byte, 0, 20+len(data))
	b = binary.BigEndian.AppendUint64(b, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := h.stream.Write(append(b, data...))
	return err
}

// cutString takes a string with its 32-bit length off the front of b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n, rest := binary.BigEndian.Uint32(b), b[4:]
	if n > maxName || int(n) > len(rest) {
		return "", nil, false
	}
	return string(rest[:n]), rest[n:], true
}

// clip makes a client's string fit for a message.
func clip(s string) string {
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}
