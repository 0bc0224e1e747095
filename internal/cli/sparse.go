package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

const (
	chunk     = 1 << 20 // bytes of one record at most
	zeroBlock = 4096    // bytes; a block of zeros is left out
)

// A sparseReader yields the data of a disk in rising order of offset and leaves
// out what reads as zeros: holes of the file, and blocks of zeros in it.
type sparseReader struct {
	src  *source
	run  int   // index of the current run
	pos  int64 // in the run
	end  int64 // of the current stretch of data in the run
	buf  []byte
	have []byte // of buf, not yet looked at
	at   int64  // on the disk, of have

	seen int64 // bytes of data that were looked at
}

func newSparseReader(s *source) *sparseReader {
	return &sparseReader{src: s, buf: make([]byte, chunk)}
}

// Next returns some data and where on the disk it belongs. The data is valid
// until the next call. At the end of the disk it returns io.EOF.
func (r *sparseReader) Next() (offset int64, data []byte, err error) {
	for {
		if len(r.have) == 0 {
			if err := r.fill(); err != nil {
				return 0, nil, err
			}
		}
		// Blocks are counted on the disk, so that a record never holds half of one.
		skip := prefix(r.have, r.at, true)
		r.have, r.at, r.seen = r.have[skip:], r.at+int64(skip), r.seen+int64(skip)
		n := prefix(r.have, r.at, false)
		if n == 0 {
			continue
		}
		offset, data = r.at, r.have[:n]
		r.have, r.at, r.seen = r.have[n:], r.at+int64(n), r.seen+int64(n)
		return offset, data, nil
	}
}

var zeros [zeroBlock]byte

// prefix counts the bytes at the start of b, which is at offset at, in blocks
// that are all zero, or in blocks that are not.
func prefix(b []byte, at int64, zero bool) (n int) {
	for n < len(b) {
		block := min(len(b)-n, zeroBlock-int((at+int64(n))%zeroBlock))
		if bytes.Equal(b[n:n+block], zeros[:block]) != zero {
			break
		}
		n += block
	}
	return n
}

// fill reads the next piece of data.
func (r *sparseReader) fill() error {
	for r.run < len(r.src.runs) {
		run := &r.src.runs[r.run]
		if r.pos >= run.length {
			r.run, r.pos, r.end = r.run+1, 0, 0
			continue
		}
		if r.pos >= r.end {
			start, end, err := nextData(run, r.pos)
			if err != nil {
				return fmt.Errorf("looking for data in %s: %w", run.file.Name(), err)
			}
			r.pos, r.end = start, end
			continue
		}
		n := int(min(r.end-r.pos, chunk))
		if _, err := run.file.ReadAt(r.buf[:n], run.offset+r.pos); err != nil {
			if err == io.EOF {
				err = errors.New("it became shorter while it was read")
			}
			return fmt.Errorf("reading %s: %w", run.file.Name(), err)
		}
		r.have, r.at = r.buf[:n], run.at+r.pos
		r.pos += int64(n)
		return nil
	}
	return io.EOF
}

// nextData finds the next stretch of data at or after pos, in a run's own
// offsets; start is the run's length when there is none. Where the file cannot
// tell, everything is data.
func nextData(r *run, pos int64) (start, end int64, err error) {
	fd := int(r.file.Fd())
	data, err := unix.Seek(fd, r.offset+pos, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // nothing but a hole
		if size, serr := unix.Seek(fd, 0, unix.SEEK_END); serr != nil || size < r.offset+r.length {
			return 0, 0, errors.Join(serr, errors.New("it became shorter while it was read"))
		}
		return r.length, r.length, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ESPIPE):
		return pos, r.length, nil
	case err != nil:
		return 0, 0, err
	}
	if start = data - r.offset; start >= r.length {
		return r.length, r.length, nil
	}
	hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, err
	}
	return start, min(hole-r.offset, r.length), nil
}

// dataBytes counts the bytes outside of holes: what a sparseReader looks at.
func (s *source) dataBytes() (total int64, err error) {
	for i := range s.runs {
		r := &s.runs[i]
		for pos := int64(0); pos < r.length; {
			start, end, err := nextData(r, pos)
			if err != nil {
				return 0, fmt.Errorf("looking for data in %s: %w", r.file.Name(), err)
			}
			total += end - start
			pos = max(end, start)
		}
	}
	return total, nil
}
