package vimext

import (
	"context"
	"time"

	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Requests and answers, named as on the wire.
type (
	// RetrieveVMDetail: no VMs means all that the caller may read. WithKeyState
	// asks key providers for the state of each key.
	RetrieveVMDetail struct {
		This         types.ManagedObjectReference   `xml:"_this"`
		VM           []types.ManagedObjectReference `xml:"vm,omitempty"`
		WithKeyState bool                           `xml:"withKeyState"`
	}
	RetrieveVMDetailResponse struct {
		Returnval []VMDetail `xml:"returnval,omitempty"`
	}

	RetrieveTaskDetail struct {
		This types.ManagedObjectReference   `xml:"_this"`
		Task []types.ManagedObjectReference `xml:"task,omitempty"`
	}
	RetrieveTaskDetailResponse struct {
		Returnval []TaskDetail `xml:"returnval,omitempty"`
	}

	RetrieveHostDetail struct {
		This types.ManagedObjectReference `xml:"_this"`
	}
	RetrieveHostDetailResponse struct {
		Returnval []HostDetail `xml:"returnval,omitempty"`
	}

	RetrievePolicies struct {
		This types.ManagedObjectReference `xml:"_this"`
	}
	RetrievePoliciesResponse struct {
		Returnval []PolicyDetail `xml:"returnval,omitempty"`
	}

	ClonePolicy struct {
		This        types.ManagedObjectReference `xml:"_this"`
		ID          string                       `xml:"id"`
		Name        string                       `xml:"name"`
		Description string                       `xml:"description,omitempty"`
	}
	ClonePolicyResponse struct {
		Returnval PolicyDetail `xml:"returnval"`
	}

	// QueryKeys asks who needs keys, and for their states.
	QueryKeys struct {
		This types.ManagedObjectReference `xml:"_this"`
		Key  []types.CryptoKeyId          `xml:"key,omitempty"`
	}
	QueryKeysResponse struct {
		Returnval []KeyDetail `xml:"returnval,omitempty"`
	}

	// CreateJoinToken makes the token that a new host of that name joins with. 0
	// seconds is center's default.
	CreateJoinToken struct {
		This       types.ManagedObjectReference `xml:"_this"`
		Name       string                       `xml:"name"`
		TTLSeconds int64                        `xml:"ttlSeconds"`
	}
	CreateJoinTokenResponse struct {
		Returnval string `xml:"returnval"`
	}

	// TrustKeyServer confirms the certificate of one server of a provider.
	TrustKeyServer struct {
		This        types.ManagedObjectReference `xml:"_this"`
		Provider    string                       `xml:"provider"`
		Server      string                       `xml:"server"`
		Certificate string                       `xml:"certificate"` // PEM
	}
	TrustKeyServerResponse struct{}

	// RegisterVMFolder is Folder.RegisterVM_Task, and may admit a folder that was
	// restored from a backup older than what the inventory last knew of it.
	RegisterVMFolder_Task struct {
		This             types.ManagedObjectReference  `xml:"_this"`
		Path             string                        `xml:"path"` // "[ds] web1/web1.vmx"
		Name             string                        `xml:"name,omitempty"`
		Folder           types.ManagedObjectReference  `xml:"folder"`
		Pool             *types.ManagedObjectReference `xml:"pool,omitempty"`
		Host             *types.ManagedObjectReference `xml:"host,omitempty"`
		AcceptOlderEpoch bool                          `xml:"acceptOlderEpoch"`
	}
	RegisterVMFolder_TaskResponse struct {
		Returnval types.ManagedObjectReference `xml:"returnval"`
	}

	// SetTaskPace pauses a task that converts disks, lets it go on, or limits how
	// much it rewrites. What is not set stays as it is; a limit of 0 is none.
	SetTaskPace struct {
		This   types.ManagedObjectReference `xml:"_this"`
		Task   types.ManagedObjectReference `xml:"task"`
		Paused *bool                        `xml:"paused,omitempty"`
		Limit  *int64                       `xml:"limitBytesPerSecond,omitempty"`
	}
	SetTaskPaceResponse struct{}

	// EstimateReconfigVM is VirtualMachine.ReconfigVM_Task, only that it changes
	// nothing and says what would be rewritten.
	EstimateReconfigVM struct {
		This types.ManagedObjectReference   `xml:"_this"`
		VM   types.ManagedObjectReference   `xml:"vm"`
		Spec types.VirtualMachineConfigSpec `xml:"spec"`
	}
	EstimateReconfigVMResponse struct {
		Returnval Estimate `xml:"returnval"`
	}
)

// The SOAP bodies. Element names are in struct tags, so each needs a type.
type (
	retrieveVMDetailBody struct {
		Req    *RetrieveVMDetail         `xml:"urn:mortise RetrieveVMDetail,omitempty"`
		Res    *RetrieveVMDetailResponse `xml:"RetrieveVMDetailResponse,omitempty"`
		Fault_ *soap.Fault               `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	retrieveTaskDetailBody struct {
		Req    *RetrieveTaskDetail         `xml:"urn:mortise RetrieveTaskDetail,omitempty"`
		Res    *RetrieveTaskDetailResponse `xml:"RetrieveTaskDetailResponse,omitempty"`
		Fault_ *soap.Fault                 `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	retrieveHostDetailBody struct {
		Req    *RetrieveHostDetail         `xml:"urn:mortise RetrieveHostDetail,omitempty"`
		Res    *RetrieveHostDetailResponse `xml:"RetrieveHostDetailResponse,omitempty"`
		Fault_ *soap.Fault                 `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	retrievePoliciesBody struct {
		Req    *RetrievePolicies         `xml:"urn:mortise RetrievePolicies,omitempty"`
		Res    *RetrievePoliciesResponse `xml:"RetrievePoliciesResponse,omitempty"`
		Fault_ *soap.Fault               `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	clonePolicyBody struct {
		Req    *ClonePolicy         `xml:"urn:mortise ClonePolicy,omitempty"`
		Res    *ClonePolicyResponse `xml:"ClonePolicyResponse,omitempty"`
		Fault_ *soap.Fault          `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	queryKeysBody struct {
		Req    *QueryKeys         `xml:"urn:mortise QueryKeys,omitempty"`
		Res    *QueryKeysResponse `xml:"QueryKeysResponse,omitempty"`
		Fault_ *soap.Fault        `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	createJoinTokenBody struct {
		Req    *CreateJoinToken         `xml:"urn:mortise CreateJoinToken,omitempty"`
		Res    *CreateJoinTokenResponse `xml:"CreateJoinTokenResponse,omitempty"`
		Fault_ *soap.Fault              `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	trustKeyServerBody struct {
		Req    *TrustKeyServer         `xml:"urn:mortise TrustKeyServer,omitempty"`
		Res    *TrustKeyServerResponse `xml:"TrustKeyServerResponse,omitempty"`
		Fault_ *soap.Fault             `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	registerVMFolderBody struct {
		Req    *RegisterVMFolder_Task         `xml:"urn:mortise RegisterVMFolder_Task,omitempty"`
		Res    *RegisterVMFolder_TaskResponse `xml:"RegisterVMFolder_TaskResponse,omitempty"`
		Fault_ *soap.Fault                    `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	setTaskPaceBody struct {
		Req    *SetTaskPace         `xml:"urn:mortise SetTaskPace,omitempty"`
		Res    *SetTaskPaceResponse `xml:"SetTaskPaceResponse,omitempty"`
		Fault_ *soap.Fault          `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
	estimateReconfigVMBody struct {
		Req    *EstimateReconfigVM         `xml:"urn:mortise EstimateReconfigVM,omitempty"`
		Res    *EstimateReconfigVMResponse `xml:"EstimateReconfigVMResponse,omitempty"`
		Fault_ *soap.Fault                 `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
	}
)

func (b *retrieveVMDetailBody) Fault() *soap.Fault   { return b.Fault_ }
func (b *retrieveTaskDetailBody) Fault() *soap.Fault { return b.Fault_ }
func (b *retrieveHostDetailBody) Fault() *soap.Fault { return b.Fault_ }
func (b *retrievePoliciesBody) Fault() *soap.Fault   { return b.Fault_ }
func (b *clonePolicyBody) Fault() *soap.Fault        { return b.Fault_ }
func (b *queryKeysBody) Fault() *soap.Fault          { return b.Fault_ }
func (b *createJoinTokenBody) Fault() *soap.Fault    { return b.Fault_ }
func (b *trustKeyServerBody) Fault() *soap.Fault     { return b.Fault_ }
func (b *registerVMFolderBody) Fault() *soap.Fault   { return b.Fault_ }
func (b *setTaskPaceBody) Fault() *soap.Fault        { return b.Fault_ }
func (b *estimateReconfigVMBody) Fault() *soap.Fault { return b.Fault_ }

// Client calls MortiseManager through a logged-in vSphere client.
type Client struct {
	soap *soap.Client
}

// NewClient makes a Client of the soap.Client of a govmomi client that is, or
// will be, logged in.
func NewClient(c *soap.Client) *Client { return &Client{c} }

// VMDetail returns the details of VMs; without any, of all.
func (c *Client) VMDetail(ctx context.Context, withKeyState bool, vms ...types.ManagedObjectReference) ([]VMDetail, error) {
	var b retrieveVMDetailBody
	b.Req = &RetrieveVMDetail{This: Manager(), VM: vms, WithKeyState: withKeyState}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return nil, err
	}
	return b.Res.Returnval, nil
}

// TaskDetail returns the details of tasks; without any, of the recent ones.
func (c *Client) TaskDetail(ctx context.Context, tasks ...types.ManagedObjectReference) ([]TaskDetail, error) {
	var b retrieveTaskDetailBody
	b.Req = &RetrieveTaskDetail{This: Manager(), Task: tasks}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return nil, err
	}
	return b.Res.Returnval, nil
}

// HostDetail returns the details of all hosts.
func (c *Client) HostDetail(ctx context.Context) ([]HostDetail, error) {
	var b retrieveHostDetailBody
	b.Req = &RetrieveHostDetail{This: Manager()}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return nil, err
	}
	return b.Res.Returnval, nil
}

// Policies lists the storage policies.
func (c *Client) Policies(ctx context.Context) ([]PolicyDetail, error) {
	var b retrievePoliciesBody
	b.Req = &RetrievePolicies{This: Manager()}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return nil, err
	}
	return b.Res.Returnval, nil
}

// ClonePolicy makes a policy like another under a new name.
func (c *Client) ClonePolicy(ctx context.Context, id, name, description string) (PolicyDetail, error) {
	var b clonePolicyBody
	b.Req = &ClonePolicy{This: Manager(), ID: id, Name: name, Description: description}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return PolicyDetail{}, err
	}
	return b.Res.Returnval, nil
}

// QueryKeys asks who needs keys, and for their states.
func (c *Client) QueryKeys(ctx context.Context, keys ...types.CryptoKeyId) ([]KeyDetail, error) {
	var b queryKeysBody
	b.Req = &QueryKeys{This: Manager(), Key: keys}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return nil, err
	}
	return b.Res.Returnval, nil
}

// CreateJoinToken makes the token that a new host of that name joins with. A ttl
// of 0 is center's default.
func (c *Client) CreateJoinToken(ctx context.Context, name string, ttl time.Duration) (string, error) {
	var b createJoinTokenBody
	b.Req = &CreateJoinToken{This: Manager(), Name: name, TTLSeconds: int64(ttl / time.Second)}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return "", err
	}
	return b.Res.Returnval, nil
}

// TrustKeyServer confirms the certificate, in PEM, of one server of a provider.
func (c *Client) TrustKeyServer(ctx context.Context, provider, server, certificate string) error {
	var b trustKeyServerBody
	b.Req = &TrustKeyServer{This: Manager(), Provider: provider, Server: server, Certificate: certificate}
	return c.soap.RoundTrip(ctx, &b, &b)
}

// RegisterVM brings the VM in a folder into the inventory and returns the task.
func (c *Client) RegisterVM(ctx context.Context, q RegisterVMFolder_Task) (types.ManagedObjectReference, error) {
	var b registerVMFolderBody
	q.This = Manager()
	b.Req = &q
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return types.ManagedObjectReference{}, err
	}
	return b.Res.Returnval, nil
}

// SetTaskPace pauses a task that converts disks, lets it go on, or limits how many
// bytes a second it rewrites; nil changes nothing, a limit of 0 is none.
func (c *Client) SetTaskPace(ctx context.Context, task types.ManagedObjectReference, paused *bool, limit *int64) error {
	var b setTaskPaceBody
	b.Req = &SetTaskPace{This: Manager(), Task: task, Paused: paused, Limit: limit}
	return c.soap.RoundTrip(ctx, &b, &b)
}

// EstimateReconfigVM says what a change of a VM would rewrite, and changes nothing.
func (c *Client) EstimateReconfigVM(ctx context.Context, vm types.ManagedObjectReference, spec types.VirtualMachineConfigSpec) (Estimate, error) {
	var b estimateReconfigVMBody
	b.Req = &EstimateReconfigVM{This: Manager(), VM: vm, Spec: spec}
	if err := c.soap.RoundTrip(ctx, &b, &b); err != nil {
		return Estimate{}, err
	}
	return b.Res.Returnval, nil
}
