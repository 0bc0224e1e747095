package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"syscall"

	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/vimapi/vimext"
)

// A failure is an error whose text is meant for people; the cause stays
// reachable for tests and callers.
type failure struct {
	text  string
	cause error
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.cause }

// explain words an error for people: the message of a fault without the layers
// that it came through, and the way out where it is known.
func explain(err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	text := message(err)
	if hint := hint(err); hint != "" {
		text += ": " + hint
	}
	return &failure{text: text, cause: err}
}

// message is err's text with the inner text of a fault in place of how SOAP
// prints it.
func message(err error) string {
	text, inner := faultText(err)
	if text == "" {
		return err.Error()
	}
	// What was being done stands before the fault's own text.
	if doing, ok := strings.CutSuffix(err.Error(), inner.Error()); ok {
		return doing + text
	}
	return text
}

// faultText finds the innermost error that is a fault, and the message in it.
func faultText(err error) (text string, inner error) {
	var t task.Error
	if errors.As(err, &t) && t.LocalizedMethodFault != nil {
		return localized(t.LocalizedMethodFault), t
	}
	for e := err; e != nil; e = errors.Unwrap(e) {
		switch {
		case soap.IsSoapFault(e):
			f := soap.ToSoapFault(e)
			if f.String != "" {
				return f.String, e
			}
			return fmt.Sprintf("center answered %s without saying more", typeName(f.VimFault())), e
		case soap.IsVimFault(e):
			return "center answered " + typeName(soap.ToVimFault(e)), e
		}
	}
	return "", nil
}

func localized(f *types.LocalizedMethodFault) string {
	if f.LocalizedMessage != "" {
		return f.LocalizedMessage
	}
	return "center answered " + typeName(f.Fault)
}

func typeName(v any) string {
	return strings.TrimPrefix(strings.TrimPrefix(fmt.Sprintf("%T", v), "*"), "types.")
}

// vimFault is the fault in err, in either of its forms; nil when there is none.
func vimFault(err error) types.AnyType {
	var t task.Error
	if errors.As(err, &t) && t.LocalizedMethodFault != nil {
		return t.Fault()
	}
	for e := err; e != nil; e = errors.Unwrap(e) {
		switch {
		case soap.IsSoapFault(e):
			return soap.ToSoapFault(e).VimFault()
		case soap.IsVimFault(e):
			return soap.ToVimFault(e)
		}
	}
	return nil
}

// hint is the way out of an error, when the error itself does not name it.
func hint(err error) string {
	switch f := vimFault(err).(type) {
	case types.NotAuthenticated, *types.NotAuthenticated:
		return "the session has ended; run mortise login again"
	case types.EncryptionKeyRequired:
		return keysHint(f.RequiredKey)
	case *types.EncryptionKeyRequired:
		return keysHint(f.RequiredKey)
	}
	var pin *pinError
	var data *vimext.DataError
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var op *url.Error
	switch {
	case errors.As(err, &pin):
		return ""
	case errors.As(err, &data) && data.Kind == "NotAuthenticated":
		return "the session has ended; run mortise login again"
	case errors.As(err, &unknown), errors.As(err, &host):
		return "run mortise login with --thumbprint, or at a terminal, where it asks whether to trust the certificate"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "is center running, and is the port right?"
	case errors.As(err, &op) && op.Timeout():
		return "center does not answer; see whether it runs and a firewall lets you through"
	}
	return ""
}

func keysHint(keys []types.CryptoKeyId) string {
	if len(keys) == 0 {
		return ""
	}
	var names []string
	for _, k := range keys {
		names = append(names, keyName(&k))
	}
	return fmt.Sprintf("mortise key status %s tells what is the matter with the key", strings.Join(names, " "))
}
