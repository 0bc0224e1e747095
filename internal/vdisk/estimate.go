package vdisk

import (
	"context"
	"time"
)

// Estimate is [Disk.Estimate] of all links that are the disk's own, one after the other.
func (c *Chain) Estimate(ctx context.Context) (sum Estimate, err error) {
	c.shape.Lock() // the links stay
	defer c.shape.Unlock()
	for _, d := range c.links {
		if !c.own(d) {
			continue
		}
		e, err := d.Estimate(ctx)
		if err != nil {
			return sum, err
		}
		sum.Bytes, sum.Took, sum.Busy = sum.Bytes+e.Bytes, sum.Took+e.Took, sum.Busy+e.Busy
	}
	if sum.Took > 0 {
		sum.Rate = float64(sum.Bytes) / float64(sum.Took) * float64(time.Second)
	}
	return sum, nil
}
