package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"syscall"
)

// The numbers of the protocol, named as in proto.md.

const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake and client flags.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagSendDF          = 1 << 7
	flagCanMultiConn    = 1 << 8
	flagSendFastZero    = 1 << 11
)

type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 9
	optSetMetaContext  option = 10
)

const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4
	repErrUnsup    = 1<<31 + 1
	repErrPolicy   = 1<<31 + 2
	repErrInvalid  = 1<<31 + 3
	repErrTLSReqd  = 1<<31 + 5
	repErrUnknown  = 1<<31 + 6
	repErrShutdown = 1<<31 + 7
)

const (
	infoExport    = 0
	infoBlockSize = 3
)

// Metadata contexts. base:allocation has the same id on every connection; the
// bitmaps that a client chooses have the next ones. Those of QEMU's name space
// are specified in https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/nbd.txt
const (
	metaAllocation   = "base:allocation"
	metaAllocationID = 1
	metaBase         = "base:"              // in a list: all of the name space
	metaQEMU         = "qemu:"              // likewise
	metaBitmap       = "qemu:dirty-bitmap:" // and the bitmap's name
)

type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisconnect  command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdWriteZeroes command = 6
	cmdBlockStatus command = 7
)

func (c command) String() string {
	switch c {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdDisconnect:
		return "disconnect"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdWriteZeroes:
		return "write zeroes"
	case cmdBlockStatus:
		return "block status"
	}
	return "unknown"
}

// Command flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

const (
	chunkDone        = 1 << 0
	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
	chunkErrorOffset = 1<<15 + 2
)

const (
	requestSize     = 28
	simpleSize      = 16
	chunkHeaderSize = 20
)

// What the server tells clients to keep to, in bytes.
const (
	preferredBlock = 4096
	maxPayload     = 32 << 20
)

// errno is an error value as the protocol defines it; 0 is success.
type errno uint32

const (
	ePERM      errno = 1
	eIO        errno = 5
	eNOMEM     errno = 12
	eINVAL     errno = 22
	eNOSPC     errno = 28
	eOVERFLOW  errno = 75
	eNOTSUP    errno = 95
	eSHUTDOWN  errno = 108
	eSuccess   errno = 0
	maxExtents       = 256 // in one answer to BLOCK_STATUS
)

// errnoOf maps a device's error to what the client is told.
func errnoOf(err error) errno {
	if err == nil {
		return eSuccess
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return eSHUTDOWN
	}
	if errors.Is(err, errors.ErrUnsupported) {
		return eNOTSUP
	}
	var sys syscall.Errno
	if !errors.As(err, &sys) {
		return eIO
	}
	switch sys {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return ePERM
	case syscall.ENOMEM:
		return eNOMEM
	case syscall.EINVAL:
		return eINVAL
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return eNOSPC
	case syscall.EOVERFLOW:
		return eOVERFLOW
	case syscall.ESHUTDOWN:
		return eSHUTDOWN
	}
	return eIO
}

// header is a request as it comes over the wire, without its payload.
type header struct {
	flags  uint16
	cmd    command
	cookie uint64
	off    uint64
	n      uint32
}

func parseHeader(b []byte) (h header, ok bool) {
	return header{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    command(binary.BigEndian.Uint16(b[6:])),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		n:      binary.BigEndian.Uint32(b[24:]),
	}, binary.BigEndian.Uint32(b) == magicRequest
}
