package nbd

import "context"

// SectorSize is the smallest unit of a request, in bytes: the guest's logical
// block.
const SectorSize = 512

// Device is a virtual disk as the server sees it: a range of bytes that every
// connection shares. All methods may be called at the same time from many
// goroutines. The server has checked that a range is not empty, lies inside
// the disk, and begins and ends on a sector.
//
// Buffers belong to the caller and begin on a 4096-byte boundary in memory; a
// device keeps none of them after it returns.
//
// Errors are sent to the client as the errno that they wrap ([syscall.Errno]);
// one that wraps none is an EIO. Their text is logged, never sent.
type Device interface {
	// Size is the disk's length in bytes, a multiple of SectorSize. It may
	// grow; a client sees the new size when it connects again.
	Size() int64

	// ReadAt fills p with the bytes at off, or fails. Two calls that
	// overlap in time may see each other's effect in part, as on a real disk.
	ReadAt(p []byte, off int64) error

	// WriteAt writes p at off. It may change p: an encrypting device
	// encrypts in place instead of copying. The bytes need not be durable
	// before Flush.
	WriteAt(p []byte, off int64) error

	// Flush makes every write, trim and zeroing that returned before Flush
	// began, by whichever connection, durable. It may give up when ctx ends
	// and then fails.
	Flush(ctx context.Context) error

	// Trim says that n bytes at off are no longer needed. It is a hint: a
	// device may do nothing.
	Trim(off, n int64) error

	// WriteZeroes makes n bytes at off read as zeros without being sent
	// them. If punch is false the range stays (or becomes) allocated. A
	// device that could only do so by writing zeros changes nothing and
	// returns an error that wraps [errors.ErrUnsupported]; the server then
	// writes zeros with WriteAt, or tells a client that asked for a fast way
	// that there is none.
	WriteZeroes(off, n int64, punch bool) error

	// BlockStatus describes the n bytes at off as extents, in order and
	// without gaps, until emit returns false or the range is covered. An
	// extent has whole sectors; the last one may reach beyond the range.
	BlockStatus(off, n int64, emit func(n int64, s Status) bool) error
}

// Status describes an extent as the NBD metadata context base:allocation does.
// Zero, the safe answer, is allocated data.
type Status uint32

const (
	Hole Status = 1 << 0 // takes no space
	Zero Status = 1 << 1 // reads as zeros
)
