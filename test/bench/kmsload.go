package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"
)

// sequence is what vCenter does for one key, with a connection for each action:
// create it, tag it, fetch it and activate it. Where nobody parses, the answers
// are not looked at: the messages are the same.
func (b *kmsBench) sequence(addr string, version uint16, parse bool) worker {
	cfg := b.tls.Clone()
	cfg.MinVersion, cfg.MaxVersion = version, version
	discover := encodeRequest(&payloads.DiscoverVersionsRequestPayload{})
	create := encodeRequest(createRequest())
	action := func(requests ...[]byte) (answers [][]byte, err error) {
		c, err := tls.Dial("tcp", addr, cfg)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		for _, r := range append([][]byte{discover}, requests...) {
			a, err := exchange(c, r)
			if err != nil {
				return nil, err
			}
			answers = append(answers, a)
		}
		return answers[1:], nil
	}
	return func() (func() error, func(), error) {
		return func() error {
			answers, err := action(create)
			if err != nil {
				return err
			}
			id := "00000000-0000-0000-0000-000000000000"
			if parse {
				if id, err = createdID(answers[0]); err != nil {
					return err
				}
			}
			tag := func(name kmip.AttributeName, value string) kmip.OperationPayload {
				return &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: kmip.Attribute{AttributeName: name, AttributeValue: value}}
			}
			ask := func(names ...kmip.AttributeName) []byte {
				return encodeRequest(&payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: names})
			}
			tags := encodeRequest(tag("x-Product_Version", "8.0.3 build-24022515"), tag("x-Vendor", "VMware, Inc."), tag("x-Product", "VMware vSphere"))
			if _, err = action(ask("x-Product_Version"), ask("x-Vendor"), ask("x-Product"), tags); err != nil {
				return err
			}
			answers, err = action(encodeRequest(&payloads.GetRequestPayload{UniqueIdentifier: id}), ask(kmip.AttributeNameState),
				encodeRequest(&payloads.ActivateRequestPayload{UniqueIdentifier: id}))
			if err == nil && parse {
				err = succeeded(answers[2])
			}
			return err
		}, func() {}, nil
	}
}

func createdID(answer []byte) (string, error) {
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(answer, &m); err != nil {
		return "", err
	}
	if len(m.BatchItem) != 1 || m.BatchItem[0].Err() != nil {
		return "", fmt.Errorf("create: %+v", m.BatchItem)
	}
	return m.BatchItem[0].ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier, nil
}

func succeeded(answer []byte) error {
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(answer, &m); err != nil {
		return err
	}
	for _, it := range m.BatchItem {
		if err := it.Err(); err != nil {
			return err
		}
	}
	return nil
}

const (
	herdHosts = 1000
	herdKeys  = 20
)

// herd is a cluster that boots: every host connects at the same time, with the
// same certificate, and fetches its keys.
func (b *kmsBench) herd(ctx context.Context) error {
	ids := make([]string, herdHosts)
	c, err := tls.Dial("tcp", b.addr, b.tls)
	if err != nil {
		return err
	}
	defer c.Close()
	for i := range ids {
		answer, err := exchange(c, encodeRequest(createRequest()))
		if err != nil {
			return err
		}
		if ids[i], err = createdID(answer); err != nil {
			return err
		}
	}
	var times []float64
	for range kmsRounds {
		var (
			wg     sync.WaitGroup
			failed atomic.Pointer[error]
			begin  = time.Now()
		)
		for host := range herdHosts {
			wg.Go(func() {
				if err := b.boot(ctx, ids, host); err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			})
		}
		wg.Wait()
		if err := failed.Load(); err != nil {
			return fmt.Errorf("kms/boot-herd: %w", *err)
		}
		times = append(times, time.Since(begin).Seconds())
	}
	limit("kms/boot-herd-1000x20", median(times), 30, "s")
	return nil
}

func (b *kmsBench) boot(ctx context.Context, ids []string, host int) error {
	d := tls.Dialer{Config: b.tls, NetDialer: &net.Dialer{Timeout: time.Minute}}
	c, err := d.DialContext(ctx, "tcp", b.addr)
	if err != nil {
		return err
	}
	defer c.Close()
	for i := range herdKeys {
		answer, err := exchange(c, encodeRequest(&payloads.GetRequestPayload{UniqueIdentifier: ids[(host*7+i)%len(ids)]}))
		if err != nil {
			return err
		}
		if err := succeeded(answer); err != nil {
			return err
		}
	}
	return nil
}

// limit prints a figure that must not be larger than most.
func limit(name string, value, most float64, unit string) {
	fmt.Printf("BENCH %s ours=%.2f%s peer=limit:%.2f%s ratio=%.2f target=1.00\n", name, value, unit, most, unit, most/value)
}
