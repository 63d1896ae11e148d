package azurefake

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// route finds the account, container and blob of the URL, and the operation.
func (s *Server) route(q *request) *refusal {
	var err error
	if q.query, err = url.ParseQuery(q.URL.RawQuery); err != nil {
		return refuse(400, "InvalidUri", "The query cannot be read.")
	}
	path := strings.TrimPrefix(q.URL.Path, "/")
	if host, _, _ := strings.Cut(q.Host, "."); host != s.Account {
		account, rest, _ := strings.Cut(path, "/")
		if account != s.Account {
			return refuse(400, "InvalidUri", "The path does not begin with the account.")
		}
		path = rest
	}
	q.container, q.blob, _ = strings.Cut(path, "/")
	q.snapshot = q.query.Get("snapshot")
	comp, restype := q.query.Get("comp"), q.query.Get("restype")
	var op operation
	var ok bool
	switch {
	case q.container == "":
		op, ok = serviceOperations[q.Method+" "+restype+" "+comp]
	case q.blob == "":
		if name := q.container; name != "$root" && name != "$logs" && blobstore.CheckContainerName(name) != nil {
			if len(name) < 3 || len(name) > 63 {
				return refuse(400, "OutOfRangeInput", "The container's name is too short or too long.")
			}
			return refuse(400, "InvalidResourceName", "The container's name has characters that are not allowed.")
		}
		if restype != "container" {
			return badQuery("restype")
		}
		op, ok = containerOperations[q.Method+" "+comp]
	default:
		if len(q.blob) > 1024 {
			return refuse(400, "OutOfRangeInput", "The blob's name is too long.")
		}
		op, ok = blobOperations[q.Method+" "+comp]
		if ok && q.Header.Get("x-ms-copy-source") != "" {
			return errNotImplemented
		}
		if ok && q.query.Has("versionid") {
			return errNotImplemented
		}
	}
	if !ok {
		return errNotImplemented
	}
	for _, h := range []string{"x-ms-structured-body", "x-ms-encryption-key", "x-ms-encryption-scope", "x-ms-tags", "x-ms-if-tags", "x-ms-immutability-policy-until-date", "x-ms-legal-hold"} {
		if q.Header.Get(h) != "" {
			return refuse(400, "UnsupportedHeader", "azurefake does not imitate header "+h+".")
		}
	}
	if op.name == "PutPage" && q.Header.Get("x-ms-page-write") == "clear" {
		op.name = "ClearPages"
	}
	q.operation = op
	// A snapshot can be read and deleted, never written.
	if q.snapshot != "" && q.Method == http.MethodPut {
		return refuse(400, "InvalidQueryParameterValue", "A snapshot is read-only: the operation does not take one.")
	}
	if e := badIfSet(q.Header); e != nil {
		return e
	}
	return nil
}

// badIfSet refuses conditions that cannot be read.
func badIfSet(h http.Header) *refusal {
	for _, name := range []string{"If-Modified-Since", "If-Unmodified-Since"} {
		if v := h.Get(name); v != "" {
			if _, err := http.ParseTime(v); err != nil {
				return badHeader(name)
			}
		}
	}
	return nil
}

var serviceOperations = map[string]operation{
	"GET  list":                      {name: "ListContainers", level: 's', sas: "l", action: ContainerRead, do: (*Server).listContainers},
	"GET service properties":         {name: "GetBlobServiceProperties", level: 's', sas: "r", action: ServiceRead, do: (*Server).serviceProperties},
	"GET account properties":         {name: "GetAccountInformation", level: 's', sas: "rwdlacup", action: ServiceRead, do: (*Server).accountInformation},
	"HEAD account properties":        {name: "GetAccountInformation", level: 's', sas: "rwdlacup", action: ServiceRead, do: (*Server).accountInformation},
	"POST service userdelegationkey": {name: "GetUserDelegationKey", action: DelegationKey, limit: smallBody, do: (*Server).userDelegationKey},
}

var containerOperations = map[string]operation{
	"PUT ":         {name: "CreateContainer", level: 'c', sas: "cw", action: ContainerWrite, do: (*Server).createContainer},
	"DELETE ":      {name: "DeleteContainer", level: 'c', sas: "d", action: ContainerDelete, do: (*Server).deleteContainer},
	"GET ":         {name: "GetContainerProperties", level: 'c', sas: "r", action: ContainerRead, do: (*Server).containerProperties},
	"HEAD ":        {name: "GetContainerProperties", level: 'c', sas: "r", action: ContainerRead, do: (*Server).containerProperties},
	"GET metadata": {name: "GetContainerMetadata", level: 'c', sas: "r", action: ContainerRead, do: (*Server).containerProperties},
	"PUT metadata": {name: "SetContainerMetadata", level: 'c', sas: "w", action: ContainerWrite, do: (*Server).setContainerMetadata},
	"PUT lease":    {name: "LeaseContainer", level: 'c', sas: "wd", action: ContainerWrite, do: (*Server).leaseContainer},
	"GET list":     {name: "ListBlobs", level: 'c', sas: "l", action: List, do: (*Server).listBlobs},
	"GET account":  {name: "GetAccountInformation", level: 'c', sas: "rwdlacup", action: ServiceRead, do: (*Server).accountInformation},
}

var blobOperations = map[string]operation{
	"PUT ":           {name: "PutBlob", level: 'o', sas: "cw", action: Create | Write, limit: maxPutBlob, do: (*Server).putBlob},
	"GET ":           {name: "GetBlob", level: 'o', sas: "r", action: Read, do: (*Server).getBlob},
	"HEAD ":          {name: "GetBlobProperties", level: 'o', sas: "r", action: Read, do: (*Server).blobProperties},
	"DELETE ":        {name: "DeleteBlob", level: 'o', sas: "d", action: Delete, do: (*Server).deleteBlob},
	"GET metadata":   {name: "GetBlobMetadata", level: 'o', sas: "r", action: Read, do: (*Server).blobProperties},
	"HEAD metadata":  {name: "GetBlobMetadata", level: 'o', sas: "r", action: Read, do: (*Server).blobProperties},
	"PUT metadata":   {name: "SetBlobMetadata", level: 'o', sas: "w", action: Write, do: (*Server).setBlobMetadata},
	"PUT properties": {name: "SetBlobProperties", level: 'o', sas: "w", action: Write, do: (*Server).setBlobProperties},
	"PUT lease":      {name: "LeaseBlob", level: 'o', sas: "wd", action: Write, do: (*Server).leaseBlob},
	"PUT snapshot":   {name: "SnapshotBlob", level: 'o', sas: "cw", action: Create | Write, do: (*Server).snapshotBlob},
	"PUT page":       {name: "PutPage", level: 'o', sas: "w", action: Write, limit: maxPageWrite, do: (*Server).putPage},
	"GET pagelist":   {name: "GetPageRanges", level: 'o', sas: "r", action: Read, do: (*Server).pageRanges},
	"PUT block":      {name: "PutBlock", level: 'o', sas: "w", action: Write, limit: maxPutBlock, do: (*Server).putBlock},
	"PUT blocklist":  {name: "PutBlockList", level: 'o', sas: "w", action: Write, limit: smallBody, do: (*Server).putBlockList},
	"GET blocklist":  {name: "GetBlockList", level: 'o', sas: "r", action: Read, do: (*Server).getBlockList},
}
